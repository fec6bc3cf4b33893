// DynamicLoRALinear as a torch::nn::Module of libtorch: an autograd function over the tensors' own memory. Nothing is copied: DLPack turns
// tensors into views, and A, B and their gradients into tensors that any torch::optim trains.
//   * Tensors are float32 on the CPU, [..., features], features adjacent; others throw. Rows may have any stride.
//   * x is borrowed from forward to backward. Saving it keeps it alive, and lets torch notice if it changes in between.
//   * backward adds to the gradients of A and B where they lie, so they must stay: zero_grad(false), not zero_grad(), which lets go of them.
//     Autograd itself sees no gradient of A and B: hooks on them do not run, nor does torch::autograd::grad give one.
//   * Two pools of threads, torch's and the library's, would be twice as many threads as processors. The Executor here runs the library's
//     loops on torch's, so torch::set_num_threads holds for both.
// To be included before torch's headers are: those include the compiler's intrinsics, about which g++ 12 then warns.
#pragma once

#include <qdylora/qdylora.hpp>

#include <ATen/DLConvertor.h>
#include <torch/custom_class.h>
#include <torch/torch.h>

namespace qdylora::examples {

using torch::Tensor;

/// The elements of a tensor [..., features] as [tokens, features].
inline MatrixView<float> view(const Tensor& tensor) {
  const DLPackPointer<DLManagedTensor> exported(at::toDLPack(tensor));  // the elements stay `tensor`'s
  return from_dlpack<float>(exported->dl_tensor);
}

inline void run_on_torch_threads(Index count, const std::function<void(Index)>& f) {
  at::parallel_for(0, count, 1, [&](Index begin, Index end) {
    for (Index i = begin; i < end; ++i) f(i);
  });
}

/// What the backward pass of one forward pass needs.
struct Pass : torch::CustomClassHolder {
  DynamicLoRALinear<float>* layer = nullptr;
  DynamicLoRALinear<float>::Context context;
};
inline const auto pass_class = torch::class_<Pass>("qdylora", "Pass");

struct LinearFunction : torch::autograd::Function<LinearFunction> {
  // a and b are the layer's own. As arguments they give y a gradient where x has none, and torch notices if they change before backward.
  static Tensor forward(torch::autograd::AutogradContext* saved, const Tensor& x, const Tensor& a, const Tensor& b,
                        DynamicLoRALinear<float>* layer) {
    auto shape = x.sizes().vec();
    shape.back() = layer->out();
    Tensor y = torch::empty(shape, x.options());
    const auto pass = c10::make_intrusive<Pass>();
    pass->layer = layer;
    layer->forward(view(x), view(y), pass->context);
    saved->save_for_backward({x, a, b});
    saved->saved_data["pass"] = c10::IValue(pass);
    return y;
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* saved, const torch::autograd::variable_list& dys) {
    const Tensor x = saved->get_saved_variables().at(0);
    const Tensor dy = dys.at(0).contiguous();  // itself, unless it is a number expanded, as of y.sum()
    const auto pass = saved->saved_data["pass"].toCustomClass<Pass>();
    Tensor dx;
    if (saved->needs_input_grad(0)) dx = torch::empty(x.sizes(), x.options());
    pass->layer->backward(view(dy), dx.defined() ? view(dx) : MatrixView<float>{}, pass->context,
                          saved->needs_input_grad(1) ? GradientMode::accumulate : GradientMode::ignore);
    return {dx, {}, {}, {}};
  }
};

/// y = x W^T + the adapter's share, as torch::nn::Linear has it. It must outlive the graphs it is in.
struct Linear : torch::nn::Module {
  DynamicLoRALinear<float> layer;
  Tensor a, b;

  /// Quantizes `weight` [out, in].
  Linear(MatrixView<const float> weight, LoRAOptions options)
      : layer(weight, std::move(options), {}, Cpu{Executor{run_on_torch_threads}}) {
    const auto parameters = layer.parameters();
    a = share("lora_A", parameters.at(0));
    b = share("lora_B", parameters.at(1));
  }
  Tensor forward(const Tensor& x) { return LinearFunction::apply(x, a, b, &layer); }

 private:
  Tensor share(const char* name, const std::shared_ptr<Parameter<float>>& p) {
    const auto tensor = [&](Matrix<float>& m) { return at::fromDLPack(to_dlpack<DLManagedTensor>(m.view(), p).release()); };
    Tensor& parameter = register_parameter(name, tensor(p->value));
    parameter.mutable_grad() = tensor(p->gradient);
    return parameter;
  }
};

}  // namespace qdylora::examples
