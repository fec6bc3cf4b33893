// What the emulator throws where a kernel breaks a rule that a GPU would break in silence.
#pragma once

#include <stdexcept>
#include <string>

namespace test::emulator {

struct Place {
  std::string kernel;
  unsigned block[3] = {};
  int thread = 0;
};

class Fault : public std::runtime_error {
 public:
  Fault(Place place, const std::string& what)
      : std::runtime_error(place.kernel + ", block (" + std::to_string(place.block[0]) + ", " + std::to_string(place.block[1]) + ", " +
                           std::to_string(place.block[2]) + "), thread " + std::to_string(place.thread) + ": " + what),
        place_(std::move(place)) {}

  const Place& place() const noexcept { return place_; }

 private:
  Place place_;
};

}  // namespace test::emulator
