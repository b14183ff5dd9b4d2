// The optimizers' updates as structs: scalar maths only, one element at a time, like penalties.h.
//
// An update has
//   kStates  how many tensors of state lie beside a weight
//   kMoment  which of them the optimizer's metric is the root of; kNoMoment: the metric is 1;
//            kOfSeveral: only move tells it
//   move     what the weight loses, from its gradient, or q times that if kRatio; q is the metric.
//            The states a, b, c are changed in place
//
// Numbers come in the compute type: n[0] multiplies the gradient (1 / its scale; negative where the
// objective is maximized), n[1] the weight beforehand (1 - lr * decay, decoupled decay), n[2] * w
// joins the gradient (coupled decay). The rest are each update's own. The arithmetic is that of
// torch.optim's formulas, each operation rounded.
#pragma once

#include "penalties.h"

namespace pyreg {

constexpr int kMaxStates = 3;
constexpr int kNumbers = 9;
constexpr int kNoMoment = -1, kOfSeveral = -2;

template <class C>
PYREG_FN C joined(C w, C g, const C* n) {
  g = n[0] * g;
  return n[2] == C(0) ? g : g + n[2] * w;  // (w may be infinite)
}

// m = b1 m + (1 - b1) g; v = b2 v + (1 - b2) g^2; w -= n[6] m / (n[7] sqrt(v) + eps), and with
// amsgrad the largest v so far.
template <bool kAmsgrad>
struct AdamUpdate {
  static constexpr const char* name = kAmsgrad ? "adam amsgrad" : "adam";
  static constexpr int kStates = kAmsgrad ? 3 : 2, kMoment = kAmsgrad ? 2 : 1;
  static constexpr bool kRatio = true;

  template <class C>
  PYREG_FN static C move(C w, C g, C& a, C& b, C& c, C& q, const C* n) {
    g = joined(w, g, n);
    a = a + n[3] * (g - a);
    b = b * n[4] + n[5] * g * g;
    if (kAmsgrad) c = c > b ? c : b;  // NaN in b stays
    q = n[7] * square_root(kAmsgrad ? c : b) + n[8];
    return n[6] * a;
  }
};

// buffer = momentum buffer + (1 - dampening) g; w -= lr times that, or g + momentum buffer.
template <bool kMomentum, bool kNesterov>
struct SgdUpdate {
  static constexpr const char* name = kNesterov   ? "sgd nesterov"
                                      : kMomentum ? "sgd momentum"
                                                  : "sgd";
  static constexpr int kStates = kMomentum ? 1 : 0, kMoment = kNoMoment;
  static constexpr bool kRatio = false;

  template <class C>
  PYREG_FN static C move(C w, C g, C& a, C&, C&, C& q, const C* n) {
    g = joined(w, g, n);
    if (kMomentum) a = n[4] * a + n[5] * g;
    q = C(1);
    return n[3] * (kNesterov ? g + n[4] * a : kMomentum ? a : g);
  }
};

// sum += g^2; w -= lr g / (sqrt(sum) + eps)
struct AdagradUpdate {
  static constexpr const char* name = "adagrad";
  static constexpr int kStates = 1, kMoment = 0;
  static constexpr bool kRatio = true;

  template <class C>
  PYREG_FN static C move(C w, C g, C& a, C&, C&, C& q, const C* n) {
    g = joined(w, g, n);
    a = a + g * g;
    q = square_root(a) + n[4];
    return n[3] * g;
  }
};

// v = alpha v + (1 - alpha) g^2, less the square of the mean where centered; w -= lr g / (sqrt(v) +
// eps), or that in a buffer with momentum. The states are v, the mean, the buffer.
template <bool kCentered, bool kMomentum>
struct RmspropUpdate {
  static constexpr const char* name =
      kCentered   ? kMomentum ? "rmsprop centered momentum" : "rmsprop centered"
      : kMomentum ? "rmsprop momentum"
                  : "rmsprop";
  static constexpr int kStates = 1 + kCentered + kMomentum;
  static constexpr int kMoment = kCentered ? kOfSeveral : 0;
  static constexpr bool kRatio = !kMomentum;

  template <class C>
  PYREG_FN static C move(C w, C g, C& a, C& b, C& c, C& q, const C* n) {
    g = joined(w, g, n);
    a = a * n[4] + n[5] * g * g;
    if (kCentered) b = b + n[5] * (g - b);
    q = square_root(kCentered ? a - b * b : a) + n[6];
    if (!kMomentum) return n[3] * g;
    C& buffer = kCentered ? c : b;
    buffer = n[7] * buffer + g / q;
    return n[3] * buffer;
  }
};

// The gradient and the elastic net's at weight w, which may be infinite: without l2 it has no
// share. (One condition for the sign: of two, compilers make a dozen masks beside the other.)
template <class C>
PYREG_FN C penalised(C g, C w, C by, const C* strengths) {
  const C l1 = absolute(w) > C(0) ? copy_sign(strengths[0], w) : w - w;
  return g + by * (strengths[1] == C(0) ? l1 : mul_add(C(2) * strengths[1], w, l1));
}

// The new weight.
template <class U, class C>
PYREG_FN C moved(C w, C move, C q) {
  return U::kRatio ? w - quotient(move, q) : w - move;
}

// The elastic net's prox of the new weight x, at step p / q. With k = 2 p l2 and t = p l1 it is 0
// where |q x| <= t, else (q x - t sign x) / (q + k). Where x = w - move / q, that is
// w - (k w + move + t sign x) / (q + k), one division for both, which changes nothing by rounding;
// or, from k = q on, where that would cancel, the quotient itself. (An infinite weight stays, or is
// NaN where its gradient was not finite.)
template <class U, class C>
PYREG_FN C moved_and_shrunk(C w, C move, C q, C p, const C* strengths) {
  if (!U::kRatio) return ElasticNet::prox_ratio(w - move, p, q, strengths);
  const C k = C(2) * p * strengths[1], t = p * strengths[0], scaled = q * w - move;
  const C from = k < q ? w : C(0), by = k < q ? k * w + move : -scaled;
  const C x = from - (by + copy_sign(t, scaled)) / (q + k);
  const C shrunk = absolute(scaled) <= t ? C(0) : x;
  return absolute(w) < static_cast<C>(INFINITY) ? shrunk : w + (move - move);
}

using Adam = AdamUpdate<false>;
using AdamAmsgrad = AdamUpdate<true>;
using Sgd = SgdUpdate<false, false>;
using SgdMomentum = SgdUpdate<true, false>;
using SgdNesterov = SgdUpdate<true, true>;
using Rmsprop = RmspropUpdate<false, false>;
using RmspropMomentum = RmspropUpdate<false, true>;
using RmspropCentered = RmspropUpdate<true, false>;
using RmspropCenteredMomentum = RmspropUpdate<true, true>;
#define PYREG_ADAMS(X) X(Adam) X(AdamAmsgrad)
#define PYREG_SGDS(X) X(Sgd) X(SgdMomentum) X(SgdNesterov)
#define PYREG_RMSPROPS(X) \
  X(Rmsprop) X(RmspropMomentum) X(RmspropCentered) X(RmspropCenteredMomentum)
#define PYREG_UPDATES(X) PYREG_ADAMS(X) PYREG_SGDS(X) X(AdagradUpdate) PYREG_RMSPROPS(X)

#define PYREG_COUNT(U) +1
constexpr int kUpdates = 0 PYREG_UPDATES(PYREG_COUNT);
#undef PYREG_COUNT

}  // namespace pyreg
