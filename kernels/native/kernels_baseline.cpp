// The kernels that every machine can run: SSE2 on x86-64, NEON on aarch64.
#define VPO_ISA baseline
#define VPO_NAME "baseline"
#define VPO_KERNELS kBaseline
#include "kernels.inc"
