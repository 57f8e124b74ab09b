// Products with, and dequantization of, the formats of small.cuh.
#include "matvec.cuh"
#include "small.cuh"

FORMAT_KERNELS(Q4_0)
FORMAT_KERNELS(Q4_1)
FORMAT_KERNELS(Q5_0)
FORMAT_KERNELS(Q5_1)
FORMAT_KERNELS(Q8_0)
FORMAT_KERNELS(IQ4_NL)
FORMAT_KERNELS(MXFP4)

MATVECS_KERNEL(small, Blocks<Q4_0>, Blocks<Q4_1>, Blocks<Q5_0>, Blocks<Q5_1>, Blocks<Q8_0>, Blocks<IQ4_NL>,
               Blocks<MXFP4>)
