// Blocks of memory as tensors: by DLPack, the protocol that every torch reads, so that no torch header is needed.
#include "bindings.h"
#include "blocks.h"

#include <memory>
#include <new>
#include <vector>

namespace py = pybind11;

namespace fusetune {
namespace {

// DLPack's structures, as its specification lays them out (version 0, capsule "dltensor").
struct DLTensor {
  void* data;
  struct { int32_t type, id; } device;
  int32_t dimensions;
  struct { uint8_t code, bits; uint16_t lanes; } dtype;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};
struct DLManagedTensor {
  DLTensor tensor;
  void* context;
  void (*deleter)(DLManagedTensor*);
};
constexpr int32_t kCpu = 1;
constexpr uint8_t kFloat = 2, kBfloat = 4;

struct Owned {
  DLManagedTensor managed;
  std::vector<int64_t> shape;
  size_t bytes;
};

void destroy(DLManagedTensor* managed) {
  const std::unique_ptr<Owned> owned(static_cast<Owned*>(managed->context));
  give_block(managed->tensor.data, owned->bytes);
}

// A capsule that nobody has read.
void drop(PyObject* capsule) {
  if (!PyCapsule_IsValid(capsule, "dltensor")) return;
  destroy(static_cast<DLManagedTensor*>(PyCapsule_GetPointer(capsule, "dltensor")));
}

py::capsule block(const std::vector<int64_t>& shape, int dtype_code) {
  const Dtype type = dtype(dtype_code);
  auto owned = std::make_unique<Owned>();
  owned->shape = shape;
  owned->bytes = type == Dtype::f32 ? 4 : 2;
  for (const int64_t size : shape) owned->bytes *= static_cast<size_t>(size);
  void* const data = take_block(owned->bytes);
  if (!data) throw std::bad_alloc();
  DLTensor& tensor = owned->managed.tensor;
  tensor.data = data;
  tensor.device = {kCpu, 0};
  tensor.dimensions = static_cast<int32_t>(shape.size());
  tensor.dtype = {type == Dtype::bf16 ? kBfloat : kFloat, static_cast<uint8_t>(type == Dtype::f32 ? 32 : 16), 1};
  tensor.shape = owned->shape.data();
  owned->managed.context = owned.get();
  owned->managed.deleter = destroy;
  return py::capsule(&owned.release()->managed, "dltensor", drop);
}

}  // namespace

void bind_blocks(py::module_& m) {
  m.def("block", &block, py::arg("shape"), py::arg("dtype"), "A DLPack capsule of uninitialised memory.");
  m.def("release_blocks", &release_blocks, "Returns unused blocks to the system; bytes of them.");
}

}  // namespace fusetune
