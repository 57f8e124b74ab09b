// Products with, and decoding of, the formats of iq.cuh.
#include "matvec.cuh"
#include "iq.cuh"

FORMAT_KERNELS(IQ2_XXS)
FORMAT_KERNELS(IQ2_XS)
FORMAT_KERNELS(IQ2_S)
FORMAT_KERNELS(IQ3_XXS)
FORMAT_KERNELS(IQ3_S)
FORMAT_KERNELS(IQ1_S)
FORMAT_KERNELS(IQ1_M)
