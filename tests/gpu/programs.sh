# What ./run gpu needs, as paths below the build folder; their names are the targets too.
gpu_programs=(altiplano tests/cuda_kernels_gpu_test tests/llama_on_real_gpu_test tests/gpu/gpu_bench)
