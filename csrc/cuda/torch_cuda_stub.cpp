// Stands in for libtorch_cuda while issp/_CUDA is linked: what csrc/cuda calls of it, by name only.
//
// The build makes a libtorch_cuda.so of this file, in its own folder, and links it. So a CPU build
// of torch is enough to build _CUDA, the linker still refuses every other symbol that nobody
// defines (-z defs), and _CUDA names libtorch_cuda.so among the libraries it needs: a CUDA build of
// torch has it loaded, any other gives an error that says what is missing.

extern "C" __attribute__((visibility("default"))) void aoti_torch_get_current_cuda_stream() {}
