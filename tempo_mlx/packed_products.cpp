// mlx.core.quantized_matmul on the CPU by few_rows.c: in front of MLX's own, for float32 rows and weights of 4 or 8 bits.
//
// MLX exports the function that describes such a product, and finds it as it finds its BLAS: by name. Whatever is not
// such a product is handed on.

#include <dlfcn.h>

#include <atomic>
#include <stdexcept>

#include "mlx/allocator.h"
#include "mlx/backend/cpu/encoder.h"
#include "mlx/ops.h"
#include "mlx/primitives.h"
#include "mlx/utils.h"

extern "C" void few_rows_packed(int m, int n, int k, const float *x, long row_stride, long column_stride,
                                const uint32_t *w, const float *scales, const float *offsets, int bits, int group,
                                float *y);

static std::atomic<long> described{0};

/* How many products were described so far: whether this library is the one that MLX finds. */
extern "C" long packed_products_described() { return described; }

namespace mlx::core {

class PackedProduct : public UnaryPrimitive {
 public:
  PackedProduct(Stream stream, int bits, int group) : UnaryPrimitive(stream), bits_(bits), group_(group) {}

  void eval_cpu(const std::vector<array> &inputs, array &out) override {
    out.set_data(allocator::malloc(out.nbytes()));
    auto &encoder = cpu::get_command_encoder(stream());
    for (const auto &each : inputs) encoder.set_input_array(each);
    encoder.set_output_array(out);
    encoder.dispatch([x = array::unsafe_weak_copy(inputs[0]), w = array::unsafe_weak_copy(inputs[1]),
                      scales = array::unsafe_weak_copy(inputs[2]), offsets = array::unsafe_weak_copy(inputs[3]),
                      y = array::unsafe_weak_copy(out), bits = bits_, group = group_]() mutable {
      few_rows_packed(x.shape(0), w.shape(0), x.shape(1), x.data<float>(), x.strides(0), x.strides(1),
                      w.data<uint32_t>(), scales.data<float>(), offsets.data<float>(), bits, group, y.data<float>());
    });
  }
  void eval_gpu(const std::vector<array> &, array &) override {
    throw std::runtime_error("[PackedProduct] is for the CPU.");
  }
  const char *name() const override { return "PackedProduct"; }

 private:
  int bits_, group_;
};

static array in_order(const array &a, Stream s) {
  return a.is_available() && a.flags().row_contiguous ? a : contiguous(a, false, s);
}

array quantized_matmul(const array &x, const array &w, const array &scales, const std::optional<array> &biases,
                       bool transpose, std::optional<int> group_size, std::optional<int> bits,
                       const std::string &mode, StreamOrDevice s) {
  const Stream stream = to_stream(s);
  const int size = group_size.value_or(64), width = bits.value_or(4);
  if (stream.device == Device::cpu && transpose && mode == "affine" && biases && (width == 4 || width == 8) &&
      x.ndim() == 2 && w.ndim() == 2 && x.shape(0) > 0 && x.dtype() == float32 && scales.dtype() == float32 &&
      biases->dtype() == float32 && w.dtype() == uint32 && size % 32 == 0 &&
      x.shape(1) == w.shape(1) * 32 / width && x.shape(1) == scales.shape(1) * size) {
    described++;
    return array({x.shape(0), w.shape(0)}, float32, std::make_shared<PackedProduct>(stream, width, size),
                 {x, in_order(w, stream), in_order(scales, stream), in_order(*biases, stream)});
  }
  using Function = decltype(&quantized_matmul);
  static const auto own = [] {
    Dl_info found;
    if (!dladdr(reinterpret_cast<void *>(static_cast<Function>(&quantized_matmul)), &found) || !found.dli_sname)
      throw std::runtime_error("MLX's quantized_matmul was not found.");
    return reinterpret_cast<Function>(dlsym(RTLD_NEXT, found.dli_sname));
  }();
  return own(x, w, scales, biases, transpose, group_size, bits, mode, s);
}

}  // namespace mlx::core
