// Chooses the table of kernels at run time: the best instruction set that this CPU has, or FUSETUNE_CPU_ISA.
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "kernels.h"

namespace fusetune {

namespace scalar {
extern const Kernels table;
}
namespace avx2 {
extern const Kernels table;
}
namespace avx512 {
extern const Kernels table;
}
namespace avx512_bf16 {
extern const Kernels table;
}
namespace neon {
extern const Kernels table;
}
namespace amx {  // has few kernels of its own
std::remove_pointer_t<decltype(Kernels::linear)> linear;
std::remove_pointer_t<decltype(Kernels::linear_dx)> linear_dx;
}

namespace {

struct Isa {
  const char* name;
  const Kernels* table;  // null: not built
  bool (*on_this_cpu)();
};

bool always() { return true; }

#if defined(__x86_64__)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
bool has_avx512_bf16() {
  return has_avx512() && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni") &&
         __builtin_cpu_supports("avx512vbmi");
}

// Linux gives a process the tiles' registers when it asks for them.
bool has_amx() {
#if defined(__linux__)
  unsigned eax, ebx, ecx, edx = 0;
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || (edx & kBf16) == 0 || (edx & kTile) == 0) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return has_avx512_bf16() && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#else
bool has_avx2() { return false; }
bool has_avx512() { return false; }
bool has_avx512_bf16() { return false; }
bool has_amx() { return false; }
#endif

#ifdef FUSETUNE_HAS_AMX
const Kernels amx_table = [] {
  Kernels table = avx512_bf16::table;
  table.isa = "amx", table.linear = amx::linear, table.linear_dx = amx::linear_dx;
  return table;
}();
#endif

// Best first. NEON is part of every aarch64.
const Isa kIsas[] = {
#ifdef FUSETUNE_HAS_AMX
    {"amx", &amx_table, has_amx},
#else
    {"amx", nullptr, has_amx},
#endif
#ifdef FUSETUNE_HAS_AVX512_BF16
    {"avx512_bf16", &avx512_bf16::table, has_avx512_bf16},
#else
    {"avx512_bf16", nullptr, has_avx512_bf16},
#endif
#ifdef FUSETUNE_HAS_AVX512
    {"avx512", &avx512::table, has_avx512},
#else
    {"avx512", nullptr, has_avx512},
#endif
#ifdef FUSETUNE_HAS_AVX2
    {"avx2", &avx2::table, has_avx2},
#else
    {"avx2", nullptr, has_avx2},
#endif
#ifdef FUSETUNE_HAS_NEON
    {"neon", &neon::table, always},
#else
    {"neon", nullptr, always},
#endif
    {"scalar", &scalar::table, always},
};
constexpr int kIsaCount = sizeof(kIsas) / sizeof(kIsas[0]);

std::atomic<const Kernels*> current{nullptr};

const Kernels* find(const char* isa) {
  if (std::strcmp(isa, "auto") == 0) return available_kernels()[0];
  for (const Kernels* const* k = available_kernels(); *k; ++k) {
    if (std::strcmp((*k)->isa, isa) == 0) return *k;
  }
  return nullptr;
}

const Kernels* from_environment() {
  const char* isa = std::getenv("FUSETUNE_CPU_ISA");
  if (!isa || !*isa) isa = "auto";
  if (const Kernels* k = find(isa)) return k;
  std::string message = std::string("FUSETUNE_CPU_ISA=") + isa + ": " + isa_unavailable_reason(isa);
  message += "; available: auto";
  for (const Kernels* const* k = available_kernels(); *k; ++k) message += std::string(", ") + (*k)->isa;
  throw std::invalid_argument(message);
}

}  // namespace

const Kernels* const* available_kernels() {
  static const auto tables = [] {
    struct {
      const Kernels* list[kIsaCount + 1] = {};
    } found;
    int n = 0;
    for (const Isa& isa : kIsas) {
      if (isa.table && isa.on_this_cpu()) found.list[n++] = isa.table;
    }
    return found;
  }();
  return tables.list;
}

const char* isa_unavailable_reason(const char* name) {
  if (std::strcmp(name, "auto") == 0) return nullptr;
  for (const Isa& isa : kIsas) {
    if (std::strcmp(isa.name, name) != 0) continue;
    if (!isa.table) return "not built for this machine";
    return isa.on_this_cpu() ? nullptr : "this CPU does not have it";
  }
  return "no such instruction set (known: amx, avx512_bf16, avx512, avx2, neon, scalar)";
}

const Kernels& kernels() {
  const Kernels* k = current.load(std::memory_order_acquire);
  if (!k) current.store(k = from_environment(), std::memory_order_release);
  return *k;
}

bool set_isa(const char* isa) {
  const Kernels* k = find(isa);
  if (k) current.store(k, std::memory_order_release);
  return k != nullptr;
}

}  // namespace fusetune
