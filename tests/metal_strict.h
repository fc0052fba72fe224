// A stand-in for Metal's own declarations in which address spaces are types of their own, as Metal has them, and nothing of
// the C++ library is there: clang refuses a pointer into the wrong memory, and a name that Metal does not have. Nothing
// is run; see metal_shim.h for that.

#pragma once

typedef unsigned int uint; typedef unsigned short ushort; typedef unsigned char uchar;
typedef signed char int8_t; typedef unsigned char uint8_t; typedef short int16_t; typedef unsigned short uint16_t;
typedef int int32_t; typedef unsigned int uint32_t; typedef long int64_t; typedef unsigned long uint64_t;
#define device __attribute__((address_space(1)))
#define constant __attribute__((address_space(2)))
#define threadgroup static __attribute__((address_space(3)))
#define thread
typedef _Float16 half; typedef half float16_t; typedef _Float16 bfloat; typedef bfloat bfloat16_t;
struct uint3 { uint x, y, z; };
enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2 };
void threadgroup_barrier(mem_flags);
namespace metal {
float max(float, float); float min(float, float); half max(half, half); half min(half, half);
int max(int, int); int min(int, int); uint max(uint, uint); uint min(uint, uint);
long max(long, long); long min(long, long); ushort max(ushort,ushort); ushort min(ushort,ushort); short max(short,short); short min(short,short);
float exp(float); half exp(half); float log(float); half log(half); float tanh(float); half tanh(half);
namespace precise { float exp(float); float log(float); float tanh(float); }
namespace fast { float exp(float); float log(float); float tanh(float); }
template <typename T> T simd_shuffle_xor(T, ushort); float simd_max(float); half simd_max(half); int simd_max(int); bool simd_any(bool); bool simd_all(bool);
float dot(float, float); 
using ::mem_flags; using ::threadgroup_barrier;
}
using namespace metal;
