// expect: HasAdamW
// expect: sum_squares
// The compiler names the part of the concept and the operation that a backend lacks.
#include <qdylora/qdylora.hpp>

namespace qd = qdylora;

class Incomplete : public qd::Cpu {
  void sum_squares() const;  // hides the CPU's, and is none
};

void use(qd::DynamicLoRALinear<float, Incomplete>& layer) { layer.set_rank(1); }
