// The CUDA kernels of csrc/cuda/inner_update.cu as a CPU library; see cuda_emulation.h.
#define FASTMETA_EMULATE_CUDA
#define FASTMETA_POISON

#include "cuda/inner_update.cu"
