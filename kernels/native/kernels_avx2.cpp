// The kernels compiled with -mavx2 -mf16c, which run only where the processor has both.
#define VPO_ISA avx2
#define VPO_NAME "avx2"
#define VPO_KERNELS kAvx2
#include "kernels.inc"
