// Attention of few tokens, and the rotary embedding before it. Included by body.inc.h, after between.inc.h.

// --- rotary embedding ---

template <class T>
static void rotate_heads(const zp_heads& heads, const zp_rotation& r, int64_t sequence, int64_t token) {
  using Stored = typename T::Stored;
  int64_t width = r.width, half = width / 2, row = (sequence * r.tokens + token) * width;
  const auto* x = (const Stored*)heads.x + row * heads.heads;
  const auto* cosine = (const Stored*)r.cos + sequence * r.cos_stride + token * width;
  const auto* sine = (const Stored*)r.sin + sequence * r.cos_stride + token * width;
  auto* y = (Stored*)heads.y + sequence * heads.batch_stride + token * width;
  for (int64_t h = 0; h < heads.heads; h++, x += width, y += heads.head_stride) {
    for (int64_t i = 0; i < half; i += BOTH) {
      F first[2], second[2], c[2], s[2], out[2];
      read_at<T>(x, i, half, first), read_at<T>(x + half, i, half, second);
      read_at<T>(cosine, i, half, c), read_at<T>(sine, i, half, s);
      unroll<2>([&](auto v) INLINE { out[v] = sub(mul(first[v], c[v]), mul(second[v], s[v])); });
      write_at<T>(y, i, half, out);
      read_at<T>(cosine + half, i, half, c), read_at<T>(sine + half, i, half, s);
      unroll<2>([&](auto v) INLINE { out[v] = fma(second[v], c[v], mul(first[v], s[v])); });
      write_at<T>(y + half, i, half, out);
    }
  }
}

static void copy_heads(const zp_heads& heads, const zp_rotation& r, int64_t sequence, int64_t token) {
  int64_t size = r.dtype == ZP_F32 ? 4 : 2, bytes = r.width * size;
  const auto* x = (const uint8_t*)heads.x + (sequence * r.tokens + token) * heads.heads * bytes;
  auto* y = (uint8_t*)heads.y + sequence * heads.batch_stride * size + token * bytes;
  for (int64_t h = 0; h < heads.heads; h++) __builtin_memcpy(y + h * heads.head_stride * size, x + h * bytes, bytes);
}

static void rotate(const zp_rotation& r, int64_t begin, int64_t end) {
  with_type<Bfloat16>(r.dtype, [&](auto t) {
    for (int64_t i = begin; i < end; i++) {
      int64_t sequence = i / r.tokens, token = i % r.tokens;
      rotate_heads<decltype(t)>(r.queries, r, sequence, token);
      rotate_heads<decltype(t)>(r.keys, r, sequence, token);
      copy_heads(r.values, r, sequence, token);
    }
  });
}

// --- attention ---

// A softmax over a row of scores that come in parts: the largest so far, and the sum of e^(score - largest).
// Milakov and Gimelshein 2018, algorithm 3.
struct Softmax {
  float largest = -__builtin_inff(), total = 0;

  // Puts its factor in the place of each of `count` scores, which are followed by room to fill up a vector. Returns the
  // factor of all that came before.
  inline float take(float* scores, int64_t count) {
    for (int64_t i = count; i % W != 0; i++) scores[i] = -__builtin_inff();
    F top = set1(largest), sums = zero();
    for (int64_t i = 0; i < count; i += W) top = max(top, load(scores + i));
    float before = largest, factor[W];
    largest = highest(top);
    for (int64_t i = 0; i < count; i += W) {
      F e = exponential(sub(load(scores + i), set1(largest)));
      store(scores + i, e);
      sums = add(sums, e);
    }
    store(factor, exponential(set1(before - largest)));
    total = total * factor[0] + sum(sums);
    return factor[0];
  }
};

constexpr int64_t KEYS = 256;  // whose scores are kept at a time
constexpr int HEADS = 4;       // that read the same keys together

// Of positions [begin, begin + count): scores of SHARED heads, whose queries lie one after the other in words.
template <class T, int SHARED, int COUNT>
static inline INLINE void score_keys(const zp_attention& a, const float* queries, const typename T::Stored* keys,
                                     float* scores) {
  F sums[COUNT][SHARED];
  unroll<COUNT>([&](auto j) INLINE { unroll<SHARED>([&](auto h) INLINE { sums[j][h] = zero(); }); });
  for (int64_t d = 0; d < a.width; d += BOTH) {
    unroll<COUNT>([&](auto j) INLINE {
      F key[2];
      read_at<T>(keys + j * a.width, d, a.width, key);
      unroll<SHARED>([&](auto h) INLINE {
        const float* query = queries + h * ZP_MOST_WIDTH + d;
        sums[j][h] = fma(load(query), key[0], fma(load(query + W), key[1], sums[j][h]));
      });
    });
  }
  unroll<SHARED>(
      [&](auto h) INLINE { unroll<COUNT>([&](auto j) INLINE { scores[h * KEYS + j] = sum(sums[j][h]) * a.scale; }); });
}

// One token of SHARED heads, from `head` on, which have the keys and values of kv_head.
template <class T, int SHARED>
static void attend_heads(const zp_attention& a, int64_t sequence, int64_t kv_head, int64_t head, int64_t token) {
  using Stored = typename T::Stored;
  alignas(64) float queries[SHARED * ZP_MOST_WIDTH], sums[SHARED * ZP_MOST_WIDTH], scores[SHARED * KEYS];
  const auto* keys = (const Stored*)a.keys + sequence * a.keys_batch_stride + kv_head * a.keys_head_stride;
  const auto* values = (const Stored*)a.values + sequence * a.values_batch_stride + kv_head * a.values_head_stride;
  Softmax softmax[SHARED];
  for (int64_t h = 0; h < SHARED; h++) {
    const auto* query = (const Stored*)a.queries + ((sequence * a.heads + head + h) * a.tokens + token) * a.width;
    for (int64_t d = 0; d < a.width; d += BOTH) {
      F v[2];
      read_at<T>(query, d, a.width, v);
      unroll<2>([&](auto i) INLINE {
        store(queries + h * ZP_MOST_WIDTH + d + i * W, v[i]), store(sums + h * ZP_MOST_WIDTH + d + i * W, zero());
      });
    }
  }
  int64_t seen = a.length - a.tokens + token + 1;
  for (int64_t begin = 0; begin < seen; begin += KEYS) {
    int64_t count = seen - begin < KEYS ? seen - begin : KEYS, i = 0;
    const Stored* some = keys + begin * a.width;
    for (; i + 4 <= count; i += 4) score_keys<T, SHARED, 4>(a, queries, some + i * a.width, scores + i);
    for (; i < count; i++) score_keys<T, SHARED, 1>(a, queries, some + i * a.width, scores + i);
    F before[SHARED];
    unroll<SHARED>([&](auto h) INLINE { before[h] = set1(softmax[h].take(scores + h * KEYS, count)); });
    some = values + begin * a.width;
    for (int64_t d = 0; d < a.width; d += BOTH) {
      F acc[SHARED][2];
      auto sum_at = [&](auto h, auto v) INLINE { return sums + h * ZP_MOST_WIDTH + d + v * W; };
      auto each = [&](auto run)
                      INLINE { unroll<SHARED>([&](auto h) INLINE { unroll<2>([&](auto v) INLINE { run(h, v); }); }); };
      each([&](auto h, auto v) INLINE { acc[h][v] = mul(load(sum_at(h, v)), before[h]); });
      for (int64_t j = 0; j < count; j++) {
        F value[2];
        read_at<T>(some + j * a.width, d, a.width, value);
        each([&](auto h, auto v) INLINE { acc[h][v] = fma(set1(scores[h * KEYS + j]), value[v], acc[h][v]); });
      }
      each([&](auto h, auto v) INLINE { store(sum_at(h, v), acc[h][v]); });
    }
  }
  for (int64_t h = 0; h < SHARED; h++) {
    auto* y = (Stored*)a.y + ((sequence * a.tokens + token) * a.heads + head + h) * a.width;
    for (int64_t d = 0; d < a.width; d += BOTH) {
      F v[2];
      unroll<2>([&](auto i) INLINE { v[i] = div(load(sums + h * ZP_MOST_WIDTH + d + i * W), set1(softmax[h].total)); });
      write_at<T>(y, d, a.width, v);
    }
  }
}

[[maybe_unused]] static void attend(const zp_attention& a, int64_t begin, int64_t end) {
  with_type<Bfloat16>(a.dtype, [&](auto t) {
    using T = decltype(t);
    int64_t shared = a.heads / a.kv_heads;
    for (int64_t i = begin; i < end; i++) {
      int64_t token = i % a.tokens, kv_head = i / a.tokens % a.kv_heads, sequence = i / a.tokens / a.kv_heads;
      int64_t head = kv_head * shared, last = head + shared;
      for (; head + HEADS <= last; head += HEADS) attend_heads<T, HEADS>(a, sequence, kv_head, head, token);
      if (last - head == 3) attend_heads<T, 3>(a, sequence, kv_head, head, token);
      if (last - head == 2) attend_heads<T, 2>(a, sequence, kv_head, head, token);
      if (last - head == 1) attend_heads<T, 1>(a, sequence, kv_head, head, token);
    }
  });
}
