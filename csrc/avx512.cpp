// AVX512 with VNNI; see avx512.inc.h.
#include <immintrin.h>

#include "kernels.h"
#include "unroll.h"

namespace zp {
namespace {
#include "avx512.inc.h"
}  // namespace

extern const Isa avx512;
const Isa avx512 = {"avx512",
                    tile512,
                    tokens_vector,
                    prepared_bytes_vector,
                    prepare_vector,
                    rows_vector,
                    scratch_bytes_vector,
                    multiply_vector,
                    decode,
                    encode,
                    normalize,
                    gate,
                    rotate,
                    attend,
                    nullptr,
                    read,
                    peak512};

}  // namespace zp
