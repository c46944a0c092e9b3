// Stands in for kernels/cuda when the program is built without CUDA.
