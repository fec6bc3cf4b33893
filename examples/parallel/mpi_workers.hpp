// Workers that are the processes of an MPI communicator.
#pragma once

#include <mpi.h>

#include <algorithm>
#include <chrono>
#include <string>
#include <type_traits>

#include <qdylora/optim/workers.hpp>

namespace qdylora::examples {

inline void check_mpi(int result, const char* call) {
  if (result == MPI_SUCCESS) return;
  char text[MPI_MAX_ERROR_STRING];
  int length = 0;
  MPI_Error_string(result, text, &length);
  throw Error(Errc::peer, std::string(call) + ": " + printable({text, static_cast<std::size_t>(length)}));
}

/// Throws Errc::peer where MPI fails, and from all_reduce where the others have not answered within `patience`: one is gone or hangs. The
/// sum is still under way then, so all that is left to do is to save and to MPI_Abort. MPI advises that sums have the same bits everywhere,
/// and Open MPI's and MPICH's have. `comm` outlives the workers; its errors come back from now on instead of ending the process. S is the
/// type of the gradients: float, but for models of double.
template <class S = float>
Workers<S> mpi_workers(MPI_Comm comm, std::chrono::milliseconds patience = std::chrono::minutes(10)) {
  static_assert(std::is_same_v<S, float> || std::is_same_v<S, double>, "gradients are float or double");
  int index = 0, count = 0;
  check_mpi(MPI_Comm_set_errhandler(comm, MPI_ERRORS_RETURN), "MPI_Comm_set_errhandler");
  check_mpi(MPI_Comm_rank(comm, &index), "MPI_Comm_rank");
  check_mpi(MPI_Comm_size(comm, &count), "MPI_Comm_size");
  return {index, count, [=](std::span<S> numbers) {
            using Clock = std::chrono::steady_clock;
            const auto deadline = Clock::now() + patience;
            while (!numbers.empty()) {
              const auto part = numbers.first(std::min(numbers.size(), std::size_t{1} << 30));  // MPI counts in int
              numbers = numbers.subspan(part.size());
              MPI_Request request;
              const MPI_Datatype type = std::is_same_v<S, float> ? MPI_FLOAT : MPI_DOUBLE;
              check_mpi(MPI_Iallreduce(MPI_IN_PLACE, part.data(), static_cast<int>(part.size()), type, MPI_SUM, comm, &request),
                        "MPI_Iallreduce");
              for (int done = 0; done == 0;) {
                check_mpi(MPI_Test(&request, &done, MPI_STATUS_IGNORE), "MPI_Test");
                if (done == 0 && Clock::now() > deadline)
                  throw Error(Errc::peer, "MPI_Iallreduce: no sum within " + std::to_string(patience.count()) +
                                              " ms; another worker is gone, or hangs");
              }
            }
          }};
}

}  // namespace qdylora::examples
