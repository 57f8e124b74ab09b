// Products with, and dequantization of, the formats of iq.cuh.
#include "matvec.cuh"
#include "iq.cuh"

FORMAT_KERNELS(IQ2_XXS)
FORMAT_KERNELS(IQ2_XS)
FORMAT_KERNELS(IQ2_S)
FORMAT_KERNELS(IQ3_XXS)
FORMAT_KERNELS(IQ3_S)
FORMAT_KERNELS(IQ1_S)
FORMAT_KERNELS(IQ1_M)

MATVECS_KERNEL(iq, Blocks<IQ2_XXS>, Blocks<IQ2_XS>, Blocks<IQ2_S>, Blocks<IQ3_XXS>, Blocks<IQ3_S>, Blocks<IQ1_S>,
               Blocks<IQ1_M>)
