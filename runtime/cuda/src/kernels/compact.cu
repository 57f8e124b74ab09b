// Products with, and dequantization of, the formats of compact.cuh.
#include "matvec.cuh"
#include "compact.cuh"

FORMAT_KERNELS(Q1_0)
FORMAT_KERNELS(Q2_0)
FORMAT_KERNELS(TQ1_0)
FORMAT_KERNELS(TQ2_0)
FORMAT_KERNELS(NVFP4)

MATVECS_KERNEL(compact, Blocks<Q1_0>, Blocks<Q2_0>, Blocks<TQ1_0>, Blocks<TQ2_0>, Blocks<NVFP4>)
