# Included by CMake right after llama-cpp-python's project() call. Its Python binding needs only the
# libraries of llama.cpp; common/ serves the command line tools and is two thirds of the compile time.
set(LLAMA_BUILD_COMMON OFF)
