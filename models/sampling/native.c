/* One flow block over a static cache, float32, guided or not; native.py builds it and holds the memory.

   Weights are packed into panels of P columns [columns / P][depth][P], keys into tiles of P tokens
   [tokens / P][channels of a head][P]. The leading dimension of every buffer is its width rounded up to P. All threads run through every step and share its loops.
   Not with -ffast-math: it breaks the tests for NaN, and may make the whole process flush small numbers to zero. */
#include <string.h>

#include "native_vectors.h"
#ifdef _OPENMP
#include <omp.h>
#else
#define omp_get_thread_num() 0
#endif

#define P (2 * W) /* columns of a panel, tokens of a tile */
#define M 8       /* rows that share a load of weights */
#define ROUND(n) (((n) + P - 1) / P * P)

struct layer {
    const float *norm1, *norm1_b, *qkv, *qkv_b, *proj, *proj_b, *norm2, *norm2_b, *up, *up_b, *down, *down_b;
    const float *q_norm, *k_norm; /* [K] each, or NULL */
    float *keys, *values;         /* [rows][heads][tiles][K][P] and [rows][heads][tokens][K] */
};

struct block {
    int layers, channels, heads, hidden, dim, out, tokens, threads;
    int n, halves, form, guide_a, guide_b, affine; /* samples; 2 halves where guided; 0 linear, 1 closed, 2 sigma */
    int softplus;                                  /* the scale, else exp */
    float clip, inverse_temp;                        /* of log-scales, 0 = off; of the unconditional half's attention */
    const float *in, *in_b, *last, *last_b;          /* the first and the last projection */
    const float *positions, *embedding;              /* [tokens][C]; [rows][C] or NULL */
    const float *rotary;                             /* [tokens][K] cosines and sines (transformer.py) or NULL */
    const float *weights;                            /* [tokens - 1] of guidance */
    const struct layer *layer;
};

struct work { float *token, *h, *norm, *qkv, *seen, *mid, *out, *logits; }; /* buffers of one step */
int tarflow_panel(void) { return P; }

enum mode { PLAIN, GELU, ADD };

/* R rows of x times one panel; R is a constant where this is inlined. */
INLINE void tile(const int R, const float *x, long ldx, int depth, const float *w, const float *bias, float *y, long ldy,
                 enum mode mode) {
    vec s[M][2];
    for (int r = 0; r < R; r++) s[r][0] = load(bias), s[r][1] = load(bias + W);
    for (int k = 0; k < depth; k++, w += P) {
        vec w0 = load(w), w1 = load(w + W);
        for (int r = 0; r < R; r++) s[r][0] += w0 * x[r * ldx + k], s[r][1] += w1 * x[r * ldx + k];
    }
#pragma GCC unroll 8 /* else the sums go through memory, and GELU takes nearly three times as long */
    for (int r = 0; r < R; r++)
#pragma GCC unroll 2
        for (int j = 0; j < 2; j++) {
            float *to = y + r * ldy + j * W;
            store(to, mode == ADD ? load(to) + s[r][j] : mode == GELU ? gelu(s[r][j]) : s[r][j]);
        }
}

/* y[rows][columns] = x[rows][depth] w + bias, or added to y, or through GELU. A loop that all threads share. */
static void product(const float *x, int rows, int depth, const float *w, const float *bias, int columns, float *y,
                    enum mode mode) {
    const long ldx = ROUND(depth), ldy = ROUND(columns);
#pragma omp for collapse(2) schedule(static)
    for (int c = 0; c < columns; c += P)
        for (int r = 0; r < rows; r += M) {
            const float *from = x + r * ldx, *panel = w + (long)c * depth;
            float *to = y + r * ldy + c;
            switch (rows - r) {
#define CASE(R) case R: tile(R, from, ldx, depth, panel, bias + c, to, ldy, mode); break;
                CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7)
                default: tile(M, from, ldx, depth, panel, bias + c, to, ldy, mode);
            }
        }
}

static void norms(const struct block *b, int rows, const float *x, const float *weight, const float *bias, float *y) {
    const int c = b->channels;
#pragma omp for schedule(static)
    for (int r = 0; r < rows; r++) {
        const float *from = x + r * (long)ROUND(c);
        float *to = y + r * (long)ROUND(c);
        vec s = {0}, d = {0};
        for (int i = 0; i < c; i += W) s += load(from + i);
        const float mean = sum(s) / c;
        for (int i = 0; i < c; i += W) d += (load(from + i) - mean) * (load(from + i) - mean);
        const float scale = 1 / sqrtf(sum(d) / c + 1e-5f);
        for (int i = 0; i < c; i += W) store(to + i, (load(from + i) - mean) * scale * load(weight + i) + load(bias + i));
    }
}

/* C vectors of what a query sees: the values of `n` tokens by their probabilities, read as they lie. */
INLINE void weigh(const int C, const float *values, int K, int n, const float *p, float norm, float *out) {
    vec s[4] = {{0}};
    for (int t = 0; t < n; t++)
        for (int j = 0; j < C; j++) s[j] += load(values + (long)t * K + j * W) * p[t];
    for (int j = 0; j < C; j++) store(out + j * W, s[j] * norm);
}

static const float number[] = {0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15,
                               16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31}; /* P of them at most */

/* What one query sees of `n` tokens; p is room for their probabilities. */
static void attend(const float *query, float scale, const float *keys, const float *values, int n, int K, float *p, float *out) {
    vec most = all(-INFINITY), total = {0};
    for (int t = 0; t < n; t += P, keys += (long)K * P) {
        vec s[4] = {{0}};
        for (int k = 0; k < K; k += 2)
            for (int j = 0; j < 4; j++) s[j] += load(keys + k * P + j * W) * query[k + j / 2];
        vec low = (s[0] + s[2]) * scale, high = (s[1] + s[3]) * scale;
        if (n - t < P) { /* the tile's tokens that are not there yet */
            low = pick(load(number) < all(n - t), low, all(-INFINITY));
            high = pick(load(number + W) < all(n - t), high, all(-INFINITY));
        }
        store(p + t, low), store(p + t + W, high);
        most = pick(low > most, low, most), most = pick(high > most, high, most);
    }
    const float peak = largest(most);
    for (int t = 0; t < n; t += W) store(p + t, exp_negative(load(p + t) - peak)), total += load(p + t);
    float norm = 1 / sum(total);
    for (int k = 0; k < K; k += 4 * W) switch ((K - k) / W) {
#define SEEN(C) case C: weigh(C, values + k, K, n, p, norm, out + k); break;
        SEEN(1) SEEN(2) SEEN(3)
        default: weigh(4, values + k, K, n, p, norm, out + k);
    }
}

/* The layer norm of a query or key of one head, in place. */
static void normalize(float *x, int K, const float *scales) {
    float mean = 0, square = 0;
    for (int k = 0; k < K; k++) mean += x[k] / K;
    for (int k = 0; k < K; k++) square += (x[k] - mean) * (x[k] - mean);
    const float by = 1 / sqrtf(square / K + 1e-5f);
    for (int k = 0; k < K; k++) x[k] = (x[k] - mean) * by * scales[k];
}

/* Rotary positions of a query or key of one head, in place: a half of its channels by rows, then one by columns. */
static void rotate(float *x, int K, const float *cosines) {
    const float *sines = cosines + K / 2;
    for (int i = 0; i < K / 2; i++) {
        float *a = x + i + (i < K / 4 ? 0 : K / 4), *b = a + K / 4, turned = *a * cosines[i] - *b * sines[i];
        *b = *a * sines[i] + *b * cosines[i], *a = turned;
    }
}

static void attention(const struct block *b, const struct layer *l, const struct work *w, const long *first, int q) {
    const int C = b->channels, K = C / b->heads, rows = b->halves * b->n;
    const long room = ROUND(b->tokens), ld = ROUND(3 * C), ldc = ROUND(C);
    float *p = w->logits + omp_get_thread_num() * room;
#pragma omp for collapse(2) schedule(static)
    for (int r = 0; r < rows; r++)
        for (int h = 0; h < b->heads; h++) {
            float *keys = l->keys + (r * b->heads + h) * room * K, *values = l->values + (long)(r * b->heads + h) * b->tokens * K;
            float scale = 1 / sqrtf(K) * (r >= b->n ? b->inverse_temp : 1);
            for (int i = 0; i < q; i++) {
                float *row = w->qkv + ((long)r * q + i) * ld + h * K;
                long t = first[r % b->n] + i;
                if (l->q_norm) normalize(row, K, l->q_norm), normalize(row + C, K, l->k_norm);
                if (b->rotary) rotate(row, K, b->rotary + t * K), rotate(row + C, K, b->rotary + t * K);
                for (int k = 0; k < K; k++) keys[t / P * K * P + k * P + t % P] = row[C + k];
                memcpy(values + t * K, row + 2 * C, K * sizeof(float));
                attend(row, scale, keys, values, (int)t + 1, K, p, w->seen + ((long)r * q + i) * ldc + h * K);
            }
        }
}

/* The log-scale from the network's output (FlowBlock.split). */
static float log_scale(const struct block *b, float u) {
    if (b->softplus) {
        u += 0.54132485f; /* log(e - 1), where softplus is 1 */
        u = logf(1e-3f + 0.999f * ((u > 0 ? u : 0) + log1pf(expf(-fabsf(u)))));
    }
    return b->clip > 0 ? b->clip * tanhf(u / b->clip) : u;
}

/* Guided (a, b) of one token from the network's outputs c and u (u = NULL: unguided). */
static void scale_and_shift(const struct block *b, const float *c, const float *u, float weight, float *a, float *shift) {
    const int D = b->dim;
    for (int d = 0; d < D; d++) {
        float ac = b->affine ? log_scale(b, c[d]) : 0, bc = c[b->affine * D + d];
        a[d] = ac, shift[d] = bc;
        if (!u) continue;
        float au = b->affine ? log_scale(b, u[d]) : 0, bu = u[b->affine * D + d];
        float ga = ac + weight * (ac - au), gb = bc + weight * (bc - bu);
        if (b->form == 2) ga = ac + logf(fabsf(1 - weight * expm1f(au - ac)));
        if (b->form == 1) {
            float off = 2 * (ac - au), excess = -expm1f(off > 0 ? 0 : off), ratio = 1 + weight * excess;
            ga = ac - 0.5f * logf(ratio), gb = ((1 + weight) * bc - weight * (1 - excess) * bu) / ratio;
        }
        a[d] = b->guide_a ? ga : ac, shift[d] = b->guide_b ? gb : bc;
    }
}

/* The tokens first[s] + at .. + q - 1 of every sample s: into the cache, and their (a, b) out or, where a is NULL, into x. */
static void step(const struct block *b, const struct work *w, float *x, const long *first, int q, long ldab, float *a, float *shift) {
    const int C = b->channels, D = b->dim, n = b->n, rows = b->halves * n * q;
    const long ldc = ROUND(C), ldd = ROUND(D), ldo = ROUND(b->out);
#pragma omp for schedule(static)
    for (int s = 0; s < n * q; s++)
        memcpy(w->token + s * ldd, x + ((s / q) * (long)b->tokens + first[s / q] + s % q) * D, D * sizeof(float));
    product(w->token, n * q, D, b->in, b->in_b, C, w->mid, PLAIN);
#pragma omp for schedule(static)
    for (int m = 0; m < rows; m++) {
        const int r = m / q, s = r % n;
        const float *position = b->positions + (first[s] + m % q) * C, *label = b->embedding ? b->embedding + (long)r * C : 0;
        for (int c = 0; c < C; c++) w->h[m * ldc + c] = w->mid[((long)s * q + m % q) * ldc + c] + position[c] + (label ? label[c] : 0);
    }
    for (int i = 0; i < b->layers; i++) {
        const struct layer *l = b->layer + i;
        norms(b, rows, w->h, l->norm1, l->norm1_b, w->norm);
        product(w->norm, rows, C, l->qkv, l->qkv_b, 3 * C, w->qkv, PLAIN);
        attention(b, l, w, first, q);
        product(w->seen, rows, C, l->proj, l->proj_b, C, w->h, ADD);
        norms(b, rows, w->h, l->norm2, l->norm2_b, w->norm);
        product(w->norm, rows, C, l->up, l->up_b, b->hidden, w->mid, GELU);
        product(w->mid, rows, b->hidden, l->down, l->down_b, C, w->h, ADD);
    }
    product(w->h, rows, C, b->last, b->last_b, b->out, w->out, PLAIN);
#pragma omp for schedule(static)
    for (int m = 0; m < n * q; m++) {
        const int s = m / q, t = (int)first[s] + m % q; /* the outputs are about token t + 1 */
        const float *u = b->halves == 2 ? w->out + (long)(n * q + m) * ldo : 0;
        float *here = w->token + 2 * m * ldd, *now = x + (s * (long)b->tokens + t + 1) * D;
        float *to_a = a ? a + s * ldab + m % q * D : here, *to_b = a ? shift + s * ldab + m % q * D : here + ldd;
        scale_and_shift(b, w->out + m * ldo, u, b->weights[t], to_a, to_b);
        for (int d = 0; !a && d < D; d++) now[d] = now[d] * expf(to_a[d]) + to_b[d];
    }
}

static void steps(const struct block *b, const struct work *w, float *x, long *first, int count, int q, float *a, float *shift) {
    for (int at = 0; at < count; at += q) {
        const int some = count - at < q ? count - at : q;
        const long skip = (long)at * b->dim;
        step(b, w, x, first, some, (long)count * b->dim, a ? a + skip : 0, shift ? shift + skip : 0);
#pragma omp for schedule(static)
        for (int s = 0; s < b->n; s++) first[s] += some;
    }
}

/* `count` tokens after first[s] of every sample, at most q at a time; `first` is changed. A thread alone waits at no barrier. */
void tarflow_tokens(const struct block *b, const struct work *w, float *x, long *first, int count, int q, float *a, float *shift) {
    if (b->threads == 1) {
        steps(b, w, x, first, count, q, a, shift);
        return;
    }
#pragma omp parallel num_threads(b->threads)
    steps(b, w, x, first, count, q, a, shift);
}
