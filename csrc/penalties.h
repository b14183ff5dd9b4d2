// The penalties: one struct each, scalar maths only, shared by every driver and device.
//
// A struct has
//   name        the key of its formula in pyreg/reference.py
//   kStrengths  how many strengths it takes, in the order of its Python class
//   kSums       how many running sums its value needs; the k-th is dOmega/dstrength_k where that
//               strength is learnable
//   add<k>      s + the k-th sum's term of one element
//   value       the penalty's value from the finished sums, in double
//   grad        its gradient at one element (sign(0) = 0, NaN stays NaN)
//   prox        argmin_u step * Omega(u) + (u - w)^2 / 2 for one element
//   prox_ratio  the same at step p / q, 0 <= p < infinity and 0 < q <= infinity, in one division
//               that depends on q where there is such a form: divisions are what it costs. Selects
//               come before it, lest the compiler divide once per branch. p = 0 or q infinite moves
//               nothing
// and where it is not convex, but a prox at a short step is one of a convex objective,
//   prox_if_short  the same bits as prox_ratio from less work, where is_short(p, q) is true, which
//                  it is of every larger q as well
// C is the compute type: float, or double for float64 parameters. Strengths are rounded to it.
//
// x - x is +0, or NaN for what is not finite. All but L2 and ElasticNet leave mul_add alone, and so
// give the same bits on every instruction set.
//
// To add a penalty: write its struct and append it to PYREG_PENALTIES.
#pragma once

#include "scalars.h"

namespace pyreg {

constexpr int kMaxStrengths = 2;
constexpr int kMaxSums = 2;

// lam * sum |w|
struct L1 {
  static constexpr const char* name = "l1";
  static constexpr int kStrengths = 1;
  static constexpr int kSums = 1;

  template <int k, class C>
  PYREG_FN static C add(C s, C w, const C*) {
    return s + absolute(w);
  }
  PYREG_FN static double value(const double* s, const double* c) { return c[0] * s[0]; }
  template <class C>
  PYREG_FN static C grad(C w, const C* c) {
    return c[0] * sign(w);
  }
  template <class C>
  PYREG_FN static C prox(C w, C step, const C* c) {
    return soft_threshold(w, step * c[0]);
  }
  template <class C>
  PYREG_FN static C prox_ratio(C w, C p, C q, const C* c) {
    return prox(w, p / q, c);
  }
};

// lam * sum w^2
struct L2 {
  static constexpr const char* name = "l2";
  static constexpr int kStrengths = 1;
  static constexpr int kSums = 1;

  template <int k, class C>
  PYREG_FN static C add(C s, C w, const C*) {
    return mul_add(w, w, s);
  }
  PYREG_FN static double value(const double* s, const double* c) { return c[0] * s[0]; }
  template <class C>
  PYREG_FN static C grad(C w, const C* c) {
    return (C(2) * c[0]) * w;
  }
  template <class C>
  PYREG_FN static C prox(C w, C step, const C* c) {
    return quotient(w, C(1) + C(2) * step * c[0]);
  }
  template <class C>
  PYREG_FN static C prox_ratio(C w, C p, C q, const C* c) {
    q = at_most(q, kLargest<C>);
    return w * (q / (q + C(2) * p * c[0]));
  }
};

// l1 * sum |w| + l2 * sum w^2
struct ElasticNet {
  static constexpr const char* name = "elastic_net";
  static constexpr int kStrengths = 2;
  static constexpr int kSums = 2;

  template <int k, class C>
  PYREG_FN static C add(C s, C w, const C*) {
    return k == 0 ? s + absolute(w) : mul_add(w, w, s);
  }
  PYREG_FN static double value(const double* s, const double* c) {
    return c[0] * s[0] + c[1] * s[1];
  }
  template <class C>
  PYREG_FN static C grad(C w, const C* c) {
    return mul_add(C(2) * c[1], w, c[0] * sign(w));
  }
  template <class C>
  PYREG_FN static C prox(C w, C step, const C* c) {
    return quotient(soft_threshold(w, step * c[0]), C(1) + C(2) * step * c[1]);
  }
  // With k = 2 p l2 and t = p l1: |w| - (k |w| + t) / (q + k), which changes nothing by rounding,
  // or from k = q on, where that would cancel, (q |w| - t) / (q + k).
  template <class C>
  PYREG_FN static C prox_ratio(C w, C p, C q, const C* c) {
    const C a = absolute(w), k = C(2) * p * c[1], t = p * c[0];
    const C from = k < q ? a : C(0), by = k < q ? k : -q;
    const C cut = (by * a + t) / (q + k);
    const C u = a < static_cast<C>(INFINITY) ? from - cut : a;
    return u > C(0) ? copy_sign(u, w) : cut - cut;
  }
};

// lam * sum [w != 0]
struct L0 {
  static constexpr const char* name = "l0";
  static constexpr int kStrengths = 1;
  static constexpr int kSums = 1;

  template <int k, class C>
  PYREG_FN static C add(C s, C w, const C*) {
    return s + absolute(sign(w));
  }
  PYREG_FN static double value(const double* s, const double* c) { return c[0] * s[0]; }
  // It has none, and callers ask for none. NaN, so that nobody mistakes it for one.
  template <class C>
  PYREG_FN static C grad(C, const C*) {
    return static_cast<C>(NAN);
  }
  template <class C>
  PYREG_FN static C prox(C w, C step, const C* c) {
    return prox_ratio(w, step, C(1), c);
  }
  // Kept where q w^2 > 2 p lam.
  template <class C>
  PYREG_FN static C prox_ratio(C w, C p, C q, const C* c) {
    const C y = absolute(w) * (C(1) / square_root(C(2) * p * c[0]));
    return y * q * y > C(1) ? w : w - w;
  }
};

// lam * sum sqrt |w|
struct LHalf {
  static constexpr const char* name = "l_half";
  static constexpr int kStrengths = 1;
  static constexpr int kSums = 1;

  template <int k, class C>
  PYREG_FN static C add(C s, C w, const C*) {
    return s + square_root(absolute(w));
  }
  PYREG_FN static double value(const double* s, const double* c) { return c[0] * s[0]; }
  template <class C>
  PYREG_FN static C grad(C w, const C* c) {
    const C slope = C(0.5) * c[0] / square_root(absolute(w));
    return w > C(0) ? slope : w < C(0) ? -slope : w - w;
  }
  // u = r^2 |w|, r the largest root of r^3 - r + b = 0 with b = step * lam / (2 |w|^(3/2)), or 0
  // where b > (2/3)^(3/2) / 2. A polynomial is within 5e-5 of the root, Newton's step from there
  // within 6e-9, the next within 9e-17. No cosines, and the same bits everywhere.
  template <class C>
  PYREG_FN static C prox(C w, C step, const C* c) {
    return prox_ratio(w, step, C(1), c);
  }
  template <class C>
  PYREG_FN static C prox_ratio(C w, C p, C q, const C* c) {
    const C a = absolute(w);
    const C b = C(0.5) * (p * c[0]) / denominator(q * a * square_root(a));
    C r = C(1.0268765) + b * C(-5.2112714);
    r = C(0.99995323) + b * (C(-0.4926023) + b * (C(-0.55955727) + b * r));
    r = newton(r, b);
    if (sizeof(C) > sizeof(float)) r = newton(r, b);
    return b <= C(0.27216552697590868) ? w * (r * r) : w - w;
  }

 private:
  template <class C>
  PYREG_FN static C newton(C r, C b) {
    return r - (r * (r * r - C(1)) + b) / (C(3) * (r * r) - C(1));
  }
};

// lam * sum h(w), h = w^2 / (2 delta) up to |w| = delta, then |w| - delta / 2.
// With m = min(|w|, delta): h = m^2 / (2 delta) + |w| - m.
struct Huber {
  static constexpr const char* name = "huber";
  static constexpr int kStrengths = 2;
  static constexpr int kSums = 1;

  template <int k, class C>
  PYREG_FN static C add(C s, C w, const C* c) {
    const C a = absolute(w), m = at_most(a, c[1]);
    return s + (C(0.5) * m * (m * (C(1) / c[1])) + (a - m));
  }
  PYREG_FN static double value(const double* s, const double* c) { return c[0] * s[0]; }
  template <class C>
  PYREG_FN static C grad(C w, const C* c) {
    return c[0] * at_least(at_most(w * (C(1) / c[1]), C(1)), C(-1));
  }
  template <class C>
  PYREG_FN static C prox(C w, C step, const C* c) {
    return prox_ratio(w, step, C(1), c);
  }
  template <class C>
  PYREG_FN static C prox_ratio(C w, C p, C q, const C* c) {
    const C t = p * c[0], side = copy_sign(C(1), w);
    const bool inside = (absolute(w) - c[1]) * q <= t;
    const C from = inside ? C(0) : w, times = inside ? -w : side;
    q = at_most(q, kLargest<C>);
    const C top = inside ? q : t, bottom = inside ? q + t / c[1] : q;
    return from - times * (top / bottom);
  }
};

// lam * sum log(1 + |w| / eps)
struct LogSum {
  static constexpr const char* name = "log_sum";
  static constexpr int kStrengths = 2;
  static constexpr int kSums = 1;

  template <int k, class C>
  PYREG_FN static C add(C s, C w, const C* c) {
    return s + log_1_plus(absolute(w) * (C(1) / c[1]));
  }
  PYREG_FN static double value(const double* s, const double* c) { return c[0] * s[0]; }
  template <class C>
  PYREG_FN static C grad(C w, const C* c) {
    const C slope = c[0] / (absolute(w) + c[1]);
    return w > C(0) ? slope : w < C(0) ? -slope : w - w;
  }
  // With t = step lam and A = |w| + eps: the stationary point u = |w| - cut, where
  // cut = 2 t / (A + sqrt(A^2 - 4 t)) = A v / (2 (1 + sqrt(1 - v))) with v = 4 t / A^2; or 0, where
  // there is none or, as may be where t > eps^2, its objective is not above u's.
  template <class C>
  PYREG_FN static C prox(C w, C step, const C* c) {
    return prox_ratio(w, step, C(1), c);
  }
  template <class C>
  PYREG_FN static C prox_ratio(C w, C p, C q, const C* c) {
    const C cut = cut_of(w, p, q, c), u = absolute(w) - cut;
    const bool beaten =
        p * c[0] * log_1_plus(u * (C(1) / c[1])) > q * u * (C(0.5) * u + cut) && !is_short(p, q, c);
    return u > C(0) && !beaten ? copy_sign(u, w) : w - w;
  }
  template <class C>
  PYREG_FN static bool is_short(C p, C q, const C* c) {
    return p * c[0] <= q * (c[1] * c[1]);
  }
  template <class C>
  PYREG_FN static C prox_if_short(C w, C p, C q, const C* c) {
    const C u = absolute(w) - cut_of(w, p, q, c);
    return u > C(0) ? copy_sign(u, w) : w - w;
  }

 private:
  template <class C>
  PYREG_FN static C cut_of(C w, C p, C q, const C* c) {
    const C sum = at_most(absolute(w) + c[1], kLargest<C>);
    const C v = C(4) * (p * c[0]) / denominator(q * sum * sum);
    return C(0.5) * v * sum / (C(1) + square_root(C(1) - v));
  }
};

// sum of lam |w| - w^2 / (2 gamma) up to |w| = gamma lam, then gamma lam^2 / 2.
// With m = min(|w|, gamma lam): lam sum m - sum m^2 / (2 gamma), of derivative sum m by lam.
struct MCP {
  static constexpr const char* name = "mcp";
  static constexpr int kStrengths = 2;
  static constexpr int kSums = 2;

  template <int k, class C>
  PYREG_FN static C add(C s, C w, const C* c) {
    const C m = at_most(absolute(w), c[1] * c[0]);
    return k == 0 ? s + m : s + m * m;
  }
  PYREG_FN static double value(const double* s, const double* c) {
    return c[0] * s[0] - s[1] / (2 * c[1]);
  }
  template <class C>
  PYREG_FN static C grad(C w, const C* c) {
    return sign(w) * positive_part(c[0] - absolute(w) * (C(1) / c[1]), c);
  }
  // Up to gamma lam, |w| - cut with cut = step (gamma lam - |w|) / (gamma - step). From step =
  // gamma on the objective is concave there: a hard threshold, at lam sqrt(step gamma).
  template <class C>
  PYREG_FN static C prox(C w, C step, const C* c) {
    return prox_ratio(w, step, C(1), c);
  }
  template <class C>
  PYREG_FN static C prox_ratio(C w, C p, C q, const C* c) {
    const C a = absolute(w), left = c[1] * c[0] - a, rest = c[1] * q - p;
    const C y = a * (C(1) / (c[0] * square_root(p * c[1])));
    const C hard = y * q * y > C(1) ? C(0) : static_cast<C>(INFINITY);
    const C top = rest > C(0) ? p * positive_part(left, c) : hard, bottom = rest > C(0) ? rest : q;
    return soft_threshold(w, quotient(top, bottom));
  }
  template <class C>
  PYREG_FN static bool is_short(C p, C q, const C* c) {
    return c[1] * q - p > C(0);
  }
  template <class C>
  PYREG_FN static C prox_if_short(C w, C p, C q, const C* c) {
    const C left = c[1] * c[0] - absolute(w), rest = c[1] * q - p;
    return soft_threshold(w, quotient(p * positive_part(left, c), rest));
  }
};

// sum of lam |w| up to |w| = lam, (2 a lam |w| - w^2 - lam^2) / (2 (a - 1)) up to a lam, then
// (a + 1) lam^2 / 2. With m = min(|w|, a lam) and M = max(m, lam): the derivative by lam is
// s0 = sum of m + (M - lam) / (a - 1), and the value lam s0 - sum of (M^2 - lam^2) / (2 (a - 1)).
struct SCAD {
  static constexpr const char* name = "scad";
  static constexpr int kStrengths = 2;
  static constexpr int kSums = 2;

  template <int k, class C>
  PYREG_FN static C add(C s, C w, const C* c) {
    const C m = at_most(absolute(w), c[1] * c[0]), over = positive_part(m - c[0], c);
    return k == 0 ? s + (m + over * (C(1) / (c[1] - C(1)))) : s + over * (m + c[0]);
  }
  PYREG_FN static double value(const double* s, const double* c) {
    return c[0] * s[0] - s[1] / (2 * (c[1] - 1));
  }
  template <class C>
  PYREG_FN static C grad(C w, const C* c) {
    const C slope = (c[1] * c[0] - absolute(w)) * (C(1) / (c[1] - C(1)));
    return sign(w) * at_most(positive_part(slope, c), c[0]);
  }
  // From step = a - 1 on the objective is concave between lam and a lam: w, or the soft threshold,
  // which are equally good at |w| = tie. So |w| - cut, where cut is step lam up to
  // lam (1 + step) or the tie, step (a lam - |w|) / (a - 1 - step) between that and a lam, or 0.
  template <class C>
  PYREG_FN static C prox(C w, C step, const C* c) {
    return prox_ratio(w, step, C(1), c);
  }
  template <class C>
  PYREG_FN static C prox_ratio(C w, C p, C q, const C* c) {
    const C lam = c[0], a = c[1], x = absolute(w), t = p * lam, sum = a + C(1);
    const C rest = (a - C(1)) * q - p, left = positive_part(a * lam - x, c);
    const C y = x * (C(1) / (lam * square_root(p * sum)));
    const C times = rest > C(0) ? C(1) : C(2), from = rest > C(0) ? lam : lam * sum;
    const C over = p < sum * q ? (times * x - from) * q - t : y * q * y - C(1);
    const C top = rest > C(0) ? p * left : C(0), bottom = rest > C(0) ? rest : q;
    return soft_threshold(w, quotient(over > C(0) ? top : t, over > C(0) ? bottom : q));
  }
  template <class C>
  PYREG_FN static bool is_short(C p, C q, const C* c) {
    return (c[1] - C(1)) * q - p > C(0);
  }
  template <class C>
  PYREG_FN static C prox_if_short(C w, C p, C q, const C* c) {
    const C lam = c[0], x = absolute(w), t = p * lam;
    const C rest = (c[1] - C(1)) * q - p, left = positive_part(c[1] * lam - x, c);
    const bool over = (x - lam) * q > t;
    return soft_threshold(w, quotient(over ? p * left : t, over ? rest : q));
  }
};

// Those that have CUDA kernels of their own: all of them in one kernel cost all of them registers.
#define PYREG_ELEMENTARY(X) X(L1) X(L2) X(ElasticNet)
#define PYREG_PENALTIES(X) PYREG_ELEMENTARY(X) X(L0) X(LHalf) X(Huber) X(LogSum) X(MCP) X(SCAD)

// A penalty's place in the list.
template <class P>
constexpr int index_of = -1;
#define PYREG_INDEX(P) \
  template <>          \
  constexpr int index_of<P> = __COUNTER__ - kFirst;
constexpr int kFirst = __COUNTER__ + 1;
PYREG_PENALTIES(PYREG_INDEX)
#undef PYREG_INDEX

#define PYREG_COUNT(P) +1
constexpr int kPenalties = 0 PYREG_PENALTIES(PYREG_COUNT);
constexpr int kElementary = 0 PYREG_ELEMENTARY(PYREG_COUNT);
#undef PYREG_COUNT

}  // namespace pyreg
