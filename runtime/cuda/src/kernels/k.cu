// Products with, and dequantization of, the formats of k.cuh.
#include "matvec.cuh"
#include "k.cuh"

FORMAT_KERNELS(Q2_K)
FORMAT_KERNELS(Q3_K)
FORMAT_KERNELS(Q4_K)
FORMAT_KERNELS(Q5_K)
FORMAT_KERNELS(Q6_K)
FORMAT_KERNELS(IQ4_XS)

MATVECS_KERNEL(k, Blocks<Q2_K>, Blocks<Q3_K>, Blocks<Q4_K>, Blocks<Q5_K>, Blocks<Q6_K>, Blocks<IQ4_XS>)
