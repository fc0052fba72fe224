// mlx.core.quantized_matmul on the CPU by few_rows.c: in front of MLX's own, for float32 rows and weights of 4 or 8 bits.
//
// MLX's module for Python asks once, when it begins, for the address of the function in MLX's library, which the loader
// keeps for it; that address is replaced before. Whatever is not such a product is handed on.

#include <dlfcn.h>
#include <link.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cstring>
#include <stdexcept>
#include <utility>

#include "mlx/allocator.h"
#include "mlx/backend/cpu/encoder.h"
#include "mlx/ops.h"
#include "mlx/primitives.h"
#include "mlx/utils.h"

extern "C" void few_rows_packed(int m, int n, int k, const float *x, long row_stride, long column_stride,
                                const uint32_t *w, const float *scales, const float *offsets, int bits, int group,
                                float *y);

static std::atomic<long> described{0};
static std::atomic<bool> trusted{false};

/* Before this, and after it with 0, MLX's own function describes everything. */
extern "C" void packed_products_trust(int whether) { trusted = whether; }

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

static array in_front(const array &x, const array &w, const array &scales, const std::optional<array> &biases,
                      bool transpose, std::optional<int> group_size, std::optional<int> bits, const std::string &mode,
                      StreamOrDevice s) {
  const Stream stream = to_stream(s);
  const int size = group_size.value_or(64), width = bits.value_or(4);
  if (trusted && stream.device == Device::cpu && transpose && mode == "affine" && biases && (width == 4 || width == 8) &&
      x.ndim() == 2 && w.ndim() == 2 && x.shape(0) > 0 && x.dtype() == float32 && scales.dtype() == float32 &&
      biases->dtype() == float32 && w.dtype() == uint32 && size % 32 == 0 &&
      x.shape(1) == w.shape(1) * 32 / width && x.shape(1) == scales.shape(1) * size) {
    described++;
    return array({x.shape(0), w.shape(0)}, float32, std::make_shared<PackedProduct>(stream, width, size),
                 {x, in_order(w, stream), in_order(scales, stream), in_order(*biases, stream)});
  }
  return quantized_matmul(x, w, scales, biases, transpose, group_size, bits, mode, s);
}

}  // namespace mlx::core

namespace {

struct Search {
  const char *library, *name; /* whose calls of which function */
  void *ours;
  int found;
};

/* Write the address of `ours` wherever `library` keeps that of `name`, as the loader has written it there before. */
int replace(dl_phdr_info *info, size_t, void *data) {
  auto &search = *static_cast<Search *>(data);
  if (std::strcmp(info->dlpi_name, search.library) != 0) return 0;
  const ElfW(Dyn) *dynamic = nullptr;
  for (int i = 0; i < info->dlpi_phnum; i++)
    if (info->dlpi_phdr[i].p_type == PT_DYNAMIC)
      dynamic = reinterpret_cast<const ElfW(Dyn) *>(info->dlpi_addr + info->dlpi_phdr[i].p_vaddr);
  ElfW(Addr) of[DT_NUM] = {};
  for (; dynamic && dynamic->d_tag != DT_NULL; dynamic++)
    if (dynamic->d_tag < DT_NUM) of[dynamic->d_tag] = dynamic->d_un.d_ptr;
  const auto *symbols = reinterpret_cast<const ElfW(Sym) *>(of[DT_SYMTAB]);
  const auto *names = reinterpret_cast<const char *>(of[DT_STRTAB]);
  const std::pair<ElfW(Addr), ElfW(Addr)> tables[] = {{of[DT_JMPREL], of[DT_PLTRELSZ]}, {of[DT_RELA], of[DT_RELASZ]}};
  for (const auto &[table, bytes] : tables)
    for (const auto *each = reinterpret_cast<const ElfW(Rela) *>(table);
         each < reinterpret_cast<const ElfW(Rela) *>(table + bytes); each++) {
      if (std::strcmp(names + symbols[ELF64_R_SYM(each->r_info)].st_name, search.name) != 0) continue;
      const ElfW(Addr) place = info->dlpi_addr + each->r_offset, page = sysconf(_SC_PAGESIZE), start = place / page * page;
      if (mprotect(reinterpret_cast<void *>(start), place + sizeof(void *) - start, PROT_READ | PROT_WRITE) != 0) continue;
      *reinterpret_cast<void **>(place) = search.ours;
      search.found++;
    }
  return 1;
}

}  // namespace

/* Have `library`, MLX's module for Python, describe such products by this one, from when it begins on; in how many places
   it keeps the address. */
extern "C" int packed_products_begin(const char *library) {
  Dl_info own;
  if (!dladdr(reinterpret_cast<void *>(&mlx::core::quantized_matmul), &own) || !own.dli_sname) return 0;
  Search search = {library, own.dli_sname, reinterpret_cast<void *>(&mlx::core::in_front), 0};
  dl_iterate_phdr(replace, &search);
  return search.found;
}
