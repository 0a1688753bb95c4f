// The CUDA kernels of csrc/cuda/head_inner_loop.cu as a CPU library; see cuda_emulation.h.
#define FASTMETA_EMULATE_CUDA
#define FASTMETA_POISON

#include "cuda/head_inner_loop.cu"
