/* Vectors of the processor's width, and what attention and the MLP compute with them. For native.c.

   They are the compiler's own types, so this runs on any processor that a C compiler knows. */
#include <math.h>

#if defined(__AVX512F__)
#define W 16
#elif defined(__AVX__)
#define W 8
#else
#define W 4
#endif
#define INLINE static inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(4 * W)));
typedef int ivec __attribute__((vector_size(4 * W)));
typedef float loose __attribute__((vector_size(4 * W), aligned(4), may_alias)); /* at any address */

INLINE vec load(const float *p) { return *(const loose *)p; }
INLINE void store(float *p, vec v) { *(loose *)p = v; }
INLINE vec all(float x) { return (vec){0} + x; }
INLINE vec pick(ivec mask, vec yes, vec no) { return (vec)(((ivec)yes & mask) | ((ivec)no & ~mask)); }

/* One number of all in a vector, in halves: four operations wait for each other then, not fifteen. */
#define REDUCE(name, OF)                                                          \
    INLINE float name(vec v) {                                                    \
        float a[W];                                                               \
        store(a, v);                                                              \
        if (W > 8) for (int i = 0; i < W / 2; i++) a[i] = OF(a[i], a[i + W / 2]); \
        if (W > 4) for (int i = 0; i < 4; i++) a[i] = OF(a[i], a[i + 4]);         \
        for (int i = 0; i < 2; i++) a[i] = OF(a[i], a[i + 2]);                    \
        return OF(a[0], a[1]);                                                    \
    }
#define PLUS(x, y) ((x) + (y))
#define LARGER(x, y) ((x) > (y) ? (x) : (y))
REDUCE(sum, PLUS)
REDUCE(largest, LARGER)

/* exp(x) for x <= 0 to an ulp or two (Cephes); NaN stays NaN. */
INLINE vec exp_negative(vec x) {
    x = pick(x < all(-87.f), all(-87.f), x);
    vec n = (x * 1.44269504f + 12582912.f) - 12582912.f; /* to the nearest integer */
    vec f = x - n * 0.693359375f + n * 2.12194440e-4f;
    static const float c[] = {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
    vec p = all(1.9875691500e-4f);
    for (int i = 0; i < 5; i++) p = p * f + c[i];
    p = p * f * f + f + 1.f;
    return p * (vec)((__builtin_convertvector(n, ivec) + 127) << 23);
}

/* x Phi(x), the exact GELU, with the rational erf that Eigen uses in float32. */
INLINE vec gelu(vec x) {
    vec y = x * 0.70710678f;
    y = pick(y > all(4.f), all(4.f), pick(y < all(-4.f), all(-4.f), y));
    static const float over[] = {2.77068142495902e-08f, -2.10102402082508e-06f, -5.69250639462346e-05f, -7.34990630326855e-04f,
                                 -2.95459980854025e-03f, -1.60960333262415e-02f};
    static const float under[] = {-2.13374055278905e-04f, -1.68282697438203e-03f, -7.37332916720468e-03f, -1.42647390514189e-02f};
    vec s = y * y, p = all(-2.72614225801306e-10f), q = all(-1.45660718464996e-05f);
    for (int i = 0; i < 6; i++) p = p * s + over[i];
    for (int i = 0; i < 4; i++) q = q * s + under[i];
    return 0.5f * x * (1.f + y * p / q);
}
