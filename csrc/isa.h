// Instruction sets, least first. The kernels of a set may be called only where it `ms_isa_usable`.
#ifndef MICROSCALE_ISA_H
#define MICROSCALE_ISA_H

#include "format.h"

enum ms_isa { MS_BASELINE, MS_AVX2, MS_AVX512, MS_AVX512_VNNI, MS_AMX, MS_ISAS };

#ifdef __cplusplus
extern "C" {
#endif

MS_API const char* ms_isa_name(int isa);  // null beyond the last
MS_API int ms_isa_usable(int isa);        // whether this processor and system run it
MS_API int ms_isa(void);                  // the one in use: the best usable, until ms_set_isa
MS_API int ms_set_isa(int isa);           // 0, or -1 if it is not usable

#ifdef __cplusplus
}
#endif
#endif
