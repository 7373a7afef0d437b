// Tile registers 0 .. 7 of 16 rows of 64 bytes: AMX's own, or with ZP_EMULATE_TILES the same in plain C++, so that the
// kernels above them can be tested on a machine without AMX.

#ifdef ZP_EMULATE_TILES

static thread_local uint8_t tile_data[8][16][64];

static inline void tiles_begin() { __builtin_memset(tile_data, 0xff, sizeof(tile_data)); }
static inline void tiles_end() {}
template <int T>
static inline void tile_zero() {
  __builtin_memset(tile_data[T], 0, sizeof(tile_data[T]));
}
template <int T>
static inline void tile_load(const void* p, int64_t stride) {
  for (int r = 0; r < 16; r++) __builtin_memcpy(tile_data[T][r], (const uint8_t*)p + r * stride, 64);
}
template <int T>
static inline void tile_load_once(const void* p, int64_t stride) {
  tile_load<T>(p, stride);
}
template <int T>
static inline void tile_store(void* p, int64_t stride) {
  for (int r = 0; r < 16; r++) __builtin_memcpy((uint8_t*)p + r * stride, tile_data[T][r], 64);
}
template <int C, int A, int B>
static inline void tile_bytes() {
  for (int r = 0; r < 16; r++) {
    for (int n = 0; n < 16; n++) {
      int32_t sum;
      __builtin_memcpy(&sum, &tile_data[C][r][4 * n], 4);
      for (int k = 0; k < 64; k++) sum += (int)tile_data[A][r][k] * (int)(int8_t)tile_data[B][k / 4][4 * n + k % 4];
      __builtin_memcpy(&tile_data[C][r][4 * n], &sum, 4);
    }
  }
}
template <int C, int A, int B>
static inline void tile_bfloat16() {
  for (int r = 0; r < 16; r++) {
    for (int n = 0; n < 16; n++) {
      float sum;
      __builtin_memcpy(&sum, &tile_data[C][r][4 * n], 4);
      for (int k = 0; k < 32; k++) {
        uint16_t a, b;
        __builtin_memcpy(&a, &tile_data[A][r][2 * k], 2);
        __builtin_memcpy(&b, &tile_data[B][k / 2][4 * n + 2 * (k % 2)], 2);
        sum += scalar_bf16(a) * scalar_bf16(b);
      }
      __builtin_memcpy(&tile_data[C][r][4 * n], &sum, 4);
    }
  }
}

#else

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t columns[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileConfig) == 64, "the layout that LDTILECFG reads");

// Set on entry and released on exit: other libraries use tiles on the same threads.
static inline void tiles_begin() {
  static const TileConfig config;
  __asm__ volatile("" ::"r"(&config) : "memory");  // g++ 12 believes only the first 8 bytes are read
  _tile_loadconfig(&config);
}
static inline void tiles_end() { _tile_release(); }

// In assembly, because g++'s intrinsics paste the register's number as it is spelled, which no template can.
template <int T>
static inline INLINE void tile_zero() {
  __asm__ volatile("tilezero %%tmm%c0" ::"i"(T));
}
template <int T>
static inline INLINE void tile_load(const void* p, int64_t stride) {
  __asm__ volatile("tileloadd (%0, %1, 1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(T) : "memory");
}
template <int T>  // of rows that are not wanted again soon: others stay in the first-level cache
static inline INLINE void tile_load_once(const void* p, int64_t stride) {
  __asm__ volatile("tileloaddt1 (%0, %1, 1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(T) : "memory");
}
template <int T>
static inline INLINE void tile_store(void* p, int64_t stride) {
  __asm__ volatile("tilestored %%tmm%c2, (%0, %1, 1)" ::"r"(p), "r"(stride), "i"(T) : "memory");
}
template <int C, int A, int B>
static inline INLINE void tile_bytes() {
  __asm__ volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}
template <int C, int A, int B>
static inline INLINE void tile_bfloat16() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

#endif
