// Whether the compiler knows AVX512-FP16.
#pragma once

#if defined(__x86_64__) && defined(__clang__)
#define ISSP_AVX512FP16 (__clang_major__ >= 14)
#elif defined(__x86_64__) && defined(__GNUC__)
#define ISSP_AVX512FP16 (__GNUC__ >= 12)
#else
#define ISSP_AVX512FP16 0
#endif
