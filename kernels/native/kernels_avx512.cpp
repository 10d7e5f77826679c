// The kernels compiled for AVX-512 (F, BW, DQ, VL), which run only where the processor has all four.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // of GCC 12's own header, where it makes an undefined vector
#endif
#define VPO_ISA avx512
#define VPO_NAME "avx512"
#define VPO_KERNELS kAvx512
#include "kernels.inc"
