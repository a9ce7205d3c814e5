// Block-sparse causal attention in bf16 for CPUs with AVX512-BF16: fp32 scores and sums, an online softmax, no gathered copies.
// Compiled on the user's machine by cpu_native.py, which describes the arguments. No part of torch is used, so it builds in seconds.
//
// One tile is the rows of one query block of one head. Its listed key blocks pass through the L2 cache once; 32 rows at a time, a product of
// (32, D) x (D, W) fills scores that stay in the L1 cache, the softmax turns them into bf16 probabilities, and a second product adds their
// values to the tile's output. Both products are `multiply`, on operands packed in pairs along the summed dimension, as vdpbf16ps wants them.

#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <exception>
#include <thread>
#include <vector>

namespace {

constexpr int LANES = 32;      // columns of one packed group: two vectors
constexpr int ROWS = 8;        // rows of one register tile: 16 accumulators
constexpr int PANEL = 32;      // rows whose scores are in the L1 cache together
constexpr float LOG2_E = 1.44269504088896340736f;
constexpr float LN_2 = 0.69314718055994530942f;
// below every score, but finite: (-inf) - (-inf) would be NaN
constexpr float LOWEST = -FLT_MAX;

using bf16 = uint16_t;

inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// Runs worker(index) for 0 .. n-1 on `threads` threads, each with a worker of its own; a thread takes the next index that nobody has taken.
// False where one failed.
template <class MakeWorker>
bool run_parallel(int64_t n, int threads, MakeWorker make_worker) {
    std::atomic<int64_t> next{0};
    std::atomic<bool> failed{false};
    auto work = [&] {
        try {
            auto worker = make_worker();
            for (int64_t i; !failed && (i = next++) < n;) worker(i);
        } catch (const std::exception&) {
            failed = true;
        }
    };
    std::vector<std::thread> others;
    for (int t = 1; t < threads && t < n; t++) {
        try {
            others.emplace_back(work);
        } catch (const std::exception&) {
            break;  // no more threads to be had: the ones that run share the work
        }
    }
    work();
    for (auto& other : others) other.join();
    return !failed;
}

// c (ROWS, LANES) = a (ROWS, 2 * pairs) · b + scale[r] * c, or without the second term where `scale` is null.
// b: one packed group, (pairs, LANES, 2).
inline void multiply(const bf16* a, int64_t a_row, const bf16* b, int64_t pairs, float* c, int64_t c_row, const float* scale) {
    __m512 sum[ROWS][2];
    for (int r = 0; r < ROWS; r++) {
        if (scale) {
            const __m512 factor = _mm512_set1_ps(scale[r]);
            sum[r][0] = _mm512_mul_ps(_mm512_loadu_ps(c + r * c_row), factor);
            sum[r][1] = _mm512_mul_ps(_mm512_loadu_ps(c + r * c_row + 16), factor);
        } else {
            sum[r][0] = sum[r][1] = _mm512_setzero_ps();
        }
    }
    for (int64_t p = 0; p < pairs; p++) {
        const __m512bh b0 = (__m512bh)_mm512_loadu_si512(b + p * LANES * 2);
        const __m512bh b1 = (__m512bh)_mm512_loadu_si512(b + p * LANES * 2 + LANES);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) {
            int32_t pair;
            std::memcpy(&pair, a + r * a_row + 2 * p, sizeof pair);
            const __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
            sum[r][0] = _mm512_dpbf16_ps(sum[r][0], both, b0);
            sum[r][1] = _mm512_dpbf16_ps(sum[r][1], both, b1);
        }
    }
    for (int r = 0; r < ROWS; r++) {
        _mm512_storeu_ps(c + r * c_row, sum[r][0]);
        _mm512_storeu_ps(c + r * c_row + 16, sum[r][1]);
    }
}

// The mask of the first n of 16 lanes; n may be any number.
inline __mmask16 first_lanes(int64_t n) { return n >= 16 ? 0xffff : n <= 0 ? 0 : (1u << n) - 1; }

// 2^x to 2e-7; 0 for x below -150; NaN stays NaN.
inline __m512 exp2_of(__m512 x) {
    // the operand order keeps NaN: max returns its second argument then
    x = _mm512_max_ps(_mm512_set1_ps(-200.0f), x);
    const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 f = _mm512_sub_ps(x, whole);
    // the Taylor series on [-1/2, 1/2]: ln(2)^n / n!
    __m512 y = _mm512_set1_ps(1.5403530394e-4f);
    for (float term : {1.3333558146e-3f, 9.6181291076e-3f, 5.5504108665e-2f, 2.4022650696e-1f, 6.9314718056e-1f, 1.0f})
        y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(term));
    return _mm512_scalef_ps(y, whole);
}

inline __m512 tanh_of(__m512 x) {
    const __m512 one = _mm512_set1_ps(1.0f);
    // beyond 2^60 the quotient is 0 and tanh is 1
    const __m512 power = exp2_of(_mm512_min_ps(_mm512_set1_ps(60.0f), _mm512_mul_ps(x, _mm512_set1_ps(2 * LOG2_E))));
    return _mm512_sub_ps(one, _mm512_div_ps(_mm512_set1_ps(2.0f), _mm512_add_ps(power, one)));
}

}  // namespace

extern "C" {

struct Attention {
    const bf16* q;             // row r of head h at q + r * q_row + h * q_head, D values
    bf16* out;                 // likewise, Dv values
    float* lse;                // lse + h * lse_head + r, or null
    const bf16* keys;          // packed, by KV head
    const bf16* values;
    const uint8_t* mask;       // (heads, nq, nk), mask_head apart; null lists every block at or below the diagonal
    int64_t q_row, q_head, out_row, out_head, lse_head, mask_head;
    int64_t q_len, kv_len, block;
    int32_t heads, group, dim, value_dim, threads;
    float scale, softcap;      // softcap 0: none
};

// The attention of a few last rows, summed instead of multiplied with values.
struct Probe {
    const bf16* q;             // as above, `rows` rows, the last ones of the sequence
    const bf16* keys;          // packed, by KV head
    float* by_key;             // (heads, 2, kv_len): sums over the first `split` rows, and over the others
    float* by_distance;        // (heads, kv_len): sums over all rows, by how far the key lies before its row
    int64_t q_row, q_head, rows, split, kv_len, block;
    int32_t heads, group, dim, threads;
    float scale, softcap;
};

}  // extern "C"

namespace {

int64_t keys_per_block(int64_t block, int64_t dim) { return round_up(block, LANES) * dim; }
int64_t values_per_block(int64_t block, int64_t dim) { return round_up(block, LANES) * round_up(dim, LANES); }

// Turns a row of products into scores in units of log2, in place, columns from `visible` on to the lowest; returns their maximum or `top`.
inline float finish_scores(float* row, int64_t width, int64_t visible, float scale, float softcap, float top) {
    const __m512 factor = _mm512_set1_ps(softcap ? scale / softcap : scale * LOG2_E);
    const __m512 cap = _mm512_set1_ps(softcap * LOG2_E), lowest = _mm512_set1_ps(LOWEST);
    __m512 most = _mm512_set1_ps(top);
    for (int64_t c = 0; c < width; c += 16) {
        __m512 s = _mm512_mul_ps(_mm512_loadu_ps(row + c), factor);
        if (softcap) s = _mm512_mul_ps(tanh_of(s), cap);
        if (c + 16 > visible) s = _mm512_mask_mov_ps(lowest, first_lanes(visible - c), s);
        _mm512_storeu_ps(row + c, s);
        most = _mm512_max_ps(s, most);
    }
    return _mm512_reduce_max_ps(most);
}

// The buffers of one thread, and its tile's running softmax: `largest` and `total` of each row, in units of log2.
struct Tile {
    int64_t width, columns;
    std::vector<bf16> q, probs;
    std::vector<float> scores, out, largest, total, factor;

    Tile(const Attention& job)
        : width(round_up(job.block, LANES)), columns(round_up(job.value_dim, LANES)), q(round_up(job.block, PANEL) * job.dim),
          probs(PANEL * width), scores(PANEL * width), out(round_up(job.block, PANEL) * columns), largest(round_up(job.block, PANEL)),
          total(largest.size()), factor(PANEL) {}

    void begin(const Attention& job, const bf16* first, int64_t rows) {
        std::fill(out.begin(), out.end(), 0.0f);
        std::fill(largest.begin(), largest.end(), LOWEST);
        std::fill(total.begin(), total.end(), 0.0f);
        for (int64_t r = 0; r < rows; r++) std::memcpy(&q[r * job.dim], first + r * job.q_row, job.dim * sizeof(bf16));
        std::fill(q.begin() + rows * job.dim, q.end(), 0);
    }

    // Adds one key block to 32 rows. visible: columns that the panel's first row sees; each row behind it sees one more.
    void add(const Attention& job, int64_t panel, const bf16* keys, const bf16* values, int64_t visible) {
        for (int64_t c = 0; c < width; c += LANES)
            for (int64_t r = 0; r < PANEL; r += ROWS)
                multiply(&q[(panel + r) * job.dim], job.dim, keys + c * job.dim, job.dim / 2, &scores[r * width + c], width, nullptr);
        for (int64_t r = 0; r < PANEL; r++) softmax(job, panel, r, std::min(visible + r, job.block));
        for (int64_t c = 0; c < columns; c += LANES)
            for (int64_t r = 0; r < PANEL; r += ROWS)
                multiply(&probs[r * width], width, values + c * width, width / 2, &out[(panel + r) * columns + c], columns, &factor[r]);
    }

    void softmax(const Attention& job, int64_t panel, int64_t r, int64_t visible) {
        float* row = &scores[r * width];
        const float before = largest[panel + r], now = finish_scores(row, width, visible, job.scale, job.softcap, before);
        const __m512 shift = _mm512_set1_ps(now);
        __m512 sum = _mm512_setzero_ps();
        for (int64_t c = 0; c < width; c += 16) {
            __m512 p = exp2_of(_mm512_sub_ps(_mm512_loadu_ps(row + c), shift));
            // a row that sees nothing yet has the lowest score as its largest: its hidden keys must not count
            if (c + 16 > visible) p = _mm512_maskz_mov_ps(first_lanes(visible - c), p);
            sum = _mm512_add_ps(sum, p);
            _mm256_storeu_si256((__m256i*)&probs[r * width + c], (__m256i)_mm512_cvtneps_pbh(p));
        }
        factor[r] = _mm512_cvtss_f32(exp2_of(_mm512_set1_ps(before - now)));
        largest[panel + r] = now;
        total[panel + r] = total[panel + r] * factor[r] + _mm512_reduce_add_ps(sum);
    }

    void finish(const Attention& job, int64_t rows, bf16* first, float* lse) const {
        for (int64_t r = 0; r < rows; r++) {
            const bool is_empty = total[r] == 0;
            const __m512 share = _mm512_set1_ps(is_empty ? 0.0f : 1 / total[r]);
            bf16* target = first + r * job.out_row;
            for (int64_t c = 0; c < job.value_dim; c += 16) {
                const __m256i result = (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(_mm512_loadu_ps(&out[r * columns + c]), share));
                const int64_t left = job.value_dim - c;
                _mm256_mask_storeu_epi16(target + c, first_lanes(left), result);
            }
            if (lse) lse[r] = is_empty ? -INFINITY : largest[r] * LN_2 + std::log(total[r]);
        }
    }
};

void attend_tile(const Attention& job, Tile& tile, int64_t head, int64_t i) {
    const int64_t offset = job.kv_len - job.q_len, b = job.block, nk = (job.kv_len + b - 1) / b, first_block = offset / b;
    const int64_t begin = std::max(i * b, offset), end = std::min((i + 1) * b, job.kv_len), rows = end - begin;
    tile.begin(job, job.q + (begin - offset) * job.q_row + head * job.q_head, rows);
    const uint8_t* listed = job.mask ? job.mask + head * job.mask_head + (i - first_block) * nk : nullptr;
    const bf16* keys = job.keys + head / job.group * nk * keys_per_block(b, job.dim);
    const bf16* values = job.values + head / job.group * nk * values_per_block(b, job.value_dim);
    for (int64_t j = 0; j <= i; j++) {
        if (listed && !listed[j]) continue;
        for (int64_t panel = 0; panel < rows; panel += PANEL)
            tile.add(job, panel, keys + j * keys_per_block(b, job.dim), values + j * values_per_block(b, job.value_dim),
                     j < i ? b : begin + panel - j * b + 1);
    }
    tile.finish(job, rows, job.out + (begin - offset) * job.out_row + head * job.out_head,
                job.lse ? job.lse + head * job.lse_head + (begin - offset) : nullptr);
}

// Key blocks that one job of the probe reads: enough to be worth a thread, few enough to keep all of them busy with one head.
constexpr int64_t PROBE_BLOCKS = 8;

// One thread of the probe: its rows of a head against a range of key blocks.
struct ProbeRows {
    int64_t width, padded;
    std::vector<bf16> q;
    std::vector<float> scores;

    ProbeRows(const Probe& job)
        : width(round_up(job.block, LANES)), padded(round_up(job.rows, ROWS)), q(padded * job.dim), scores(ROWS * width) {}

    void load(const Probe& job, int64_t head) {
        const bf16* first = job.q + head * job.q_head;
        for (int64_t r = 0; r < job.rows; r++) std::memcpy(&q[r * job.dim], first + r * job.q_row, job.dim * sizeof(bf16));
        std::fill(q.begin() + job.rows * job.dim, q.end(), 0);
    }

    // Calls visit(row, block, visible, scores) for every row and every block of lo .. hi-1; scores are products, not yet finished.
    template <class Visit>
    void each(const Probe& job, int64_t head, int64_t lo, int64_t hi, Visit visit) {
        const int64_t b = job.block, nk = (job.kv_len + b - 1) / b, size = keys_per_block(b, job.dim);
        const bf16* keys = job.keys + head / job.group * nk * size;
        for (int64_t j = lo; j < hi; j++)
            for (int64_t r = 0; r < job.rows; r += ROWS) {
                for (int64_t c = 0; c < width; c += LANES)
                    multiply(&q[r * job.dim], job.dim, keys + j * size + c * job.dim, job.dim / 2, &scores[c], width, nullptr);
                for (int64_t x = r; x < std::min(r + ROWS, job.rows); x++)
                    visit(x, j, std::min(job.kv_len - job.rows + x - j * b + 1, b), &scores[(x - r) * width]);
            }
    }
};

}  // namespace

extern "C" {

// Elements (bf16) that one head's packed keys or values of `n` tokens take.
int64_t accel_packed_keys(int64_t n, int64_t block, int64_t dim) { return (n + block - 1) / block * keys_per_block(block, dim); }
int64_t accel_packed_values(int64_t n, int64_t block, int64_t dim) { return (n + block - 1) / block * values_per_block(block, dim); }

// Packs keys by block: groups of 32 keys, (dim / 2, 32, 2) each. source: (heads, n, dim), last stride 1. Missing keys become 0.
int accel_pack_keys(const bf16* source, int64_t head_stride, int64_t row, int64_t heads, int64_t n, int64_t block, int64_t dim, bf16* packed,
                    int threads) {
    const int64_t nk = (n + block - 1) / block, width = round_up(block, LANES);
    const auto pack = [=](int64_t job) {
        const int64_t head = job / nk, first = job % nk * block, here = std::min(block, n - first);
        bf16* target = packed + job * width * dim;
        std::memset(target, 0, width * dim * sizeof(bf16));
        for (int64_t c = 0; c < here; c++) {
            const bf16* key = source + head * head_stride + (first + c) * row;
            bf16* place = target + c / LANES * LANES * dim + c % LANES * 2;
            for (int64_t p = 0; p < dim / 2; p++) std::memcpy(place + p * LANES * 2, key + 2 * p, 2 * sizeof(bf16));
        }
    };
    return run_parallel(heads * nk, threads, [&] { return pack; }) ? 0 : 1;
}

// Packs values by block: groups of 32 columns, (width / 2, 32, 2) each, pairs along the keys.
int accel_pack_values(const bf16* source, int64_t head_stride, int64_t row, int64_t heads, int64_t n, int64_t block, int64_t dim, bf16* packed,
                      int threads) {
    const int64_t nk = (n + block - 1) / block, width = round_up(block, LANES), columns = round_up(dim, LANES);
    const auto pack = [=](int64_t job) {
        const int64_t head = job / nk, first = job % nk * block, here = std::min(block, n - first);
        bf16* target = packed + job * width * columns;
        std::memset(target, 0, width * columns * sizeof(bf16));
        for (int64_t c = 0; c < here; c++) {
            const bf16* value = source + head * head_stride + (first + c) * row;
            for (int64_t d = 0; d < dim; d++) target[d / LANES * LANES * width + (c / 2 * LANES + d % LANES) * 2 + c % 2] = value[d];
        }
    };
    return run_parallel(heads * nk, threads, [&] { return pack; }) ? 0 : 1;
}

// Writes the attention of every row and head. 0, or 1 where memory ran out.
int accel_attend(const Attention* job) {
    const int64_t first = (job->kv_len - job->q_len) / job->block, blocks = (job->kv_len + job->block - 1) / job->block - first;
    const auto make_worker = [=] {
        // the longest rows first: the threads end together. Heads side by side read the same keys
        return [=, tile = Tile(*job)](int64_t index) mutable {
            attend_tile(*job, tile, index % job->heads, first + blocks - 1 - index / job->heads);
        };
    };
    return run_parallel(job->heads * blocks, job->threads, make_worker) ? 0 : 1;
}

// Writes the sums of the rows' attention by key and by distance. 0, or 1 where memory ran out.
int accel_probe(const Probe* job) {
    const int64_t b = job->block, n = job->kv_len, rows = job->rows, width = round_up(b, LANES), nk = (n + b - 1) / b;
    const int64_t parts = (nk + PROBE_BLOCKS - 1) / PROBE_BLOCKS, span = PROBE_BLOCKS * width + rows;
    std::vector<float> largest, total, diagonals;
    try {
        largest.resize(job->heads * parts * rows, LOWEST);
        total.resize(largest.size(), 0);
        diagonals.resize(job->heads * parts * span, 0);
    } catch (const std::exception&) {
        return 1;
    }
    // the softmax's maximum and sum of each row and part
    const auto measure = [&] {
        return [&, tile = ProbeRows(*job)](int64_t index) mutable {
            const int64_t head = index / parts, lo = index % parts * PROBE_BLOCKS;
            tile.load(*job, head);
            tile.each(*job, head, lo, std::min(lo + PROBE_BLOCKS, nk), [&](int64_t r, int64_t, int64_t visible, float* row) {
                float& most = largest[index * rows + r];
                const float now = finish_scores(row, width, visible, job->scale, job->softcap, most);
                const __m512 shift = _mm512_set1_ps(now);
                __m512 sum = _mm512_setzero_ps();
                for (int64_t c = 0; c < visible; c += 16)
                    sum = _mm512_add_ps(sum, _mm512_maskz_mov_ps(first_lanes(visible - c), exp2_of(_mm512_sub_ps(_mm512_loadu_ps(row + c), shift))));
                float& here = total[index * rows + r];
                here = here * _mm512_cvtss_f32(exp2_of(_mm512_set1_ps(most - now))) + _mm512_reduce_add_ps(sum);
                most = now;
            });
        };
    };
    if (!run_parallel(job->heads * parts, job->threads, measure)) return 1;
    // one sum per row over all parts; afterwards `largest` holds log2 of it
    for (int64_t head = 0; head < job->heads; head++)
        for (int64_t r = 0; r < rows; r++) {
            const auto at = [&](int64_t part) { return (head * parts + part) * rows + r; };
            float most = LOWEST, sum = 0;
            for (int64_t part = 0; part < parts; part++) most = std::max(most, largest[at(part)]);
            for (int64_t part = 0; part < parts; part++) sum += total[at(part)] * std::exp2(largest[at(part)] - most);
            for (int64_t part = 0; part < parts; part++) largest[at(part)] = most + std::log2(sum);
        }
    const auto add_up = [&] {
        return [&, tile = ProbeRows(*job), columns = std::vector<float>(2 * width)](int64_t index) mutable {
            const int64_t head = index / parts, lo = index % parts * PROBE_BLOCKS, hi = std::min(lo + PROBE_BLOCKS, nk);
            tile.load(*job, head);
            for (int64_t j = lo; j < hi; j++) {
                std::fill(columns.begin(), columns.end(), 0.0f);
                tile.each(*job, head, j, j + 1, [&](int64_t r, int64_t, int64_t visible, float* row) {
                    finish_scores(row, width, visible, job->scale, job->softcap, LOWEST);
                    const __m512 shift = _mm512_set1_ps(largest[index * rows + r]);
                    float* column = &columns[r < job->split ? 0 : width];
                    // the keys at one distance from their row lie in one place of `diagonals`, counted from the part's first key
                    float* diagonal = &diagonals[index * span + (j - lo) * b + rows - 1 - r];
                    for (int64_t c = 0; c < visible; c += 16) {
                        const __mmask16 seen = first_lanes(visible - c);
                        const __m512 p = _mm512_maskz_mov_ps(seen, exp2_of(_mm512_sub_ps(_mm512_loadu_ps(row + c), shift)));
                        _mm512_storeu_ps(column + c, _mm512_add_ps(_mm512_loadu_ps(column + c), p));
                        _mm512_mask_storeu_ps(diagonal + c, seen, _mm512_add_ps(_mm512_maskz_loadu_ps(seen, diagonal + c), p));
                    }
                });
                for (int64_t half = 0; half < 2; half++)
                    std::memcpy(job->by_key + (head * 2 + half) * n + j * b, &columns[half * width], std::min(b, n - j * b) * sizeof(float));
            }
        };
    };
    if (!run_parallel(job->heads * parts, job->threads, add_up)) return 1;
    for (int64_t head = 0; head < job->heads; head++) {
        float* target = job->by_distance + head * n;
        std::fill(target, target + n, 0.0f);
        for (int64_t part = 0; part < parts; part++)
            for (int64_t x = 0; x < span; x++) {
                const int64_t distance = n - 1 - (part * PROBE_BLOCKS * b + x);
                if (distance >= 0) target[distance] += diagonals[(head * parts + part) * span + x];
            }
    }
    return 0;
}
}
