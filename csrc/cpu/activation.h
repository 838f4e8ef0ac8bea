// Activations and their derivatives, a vector at a time. Defined in pylib/reference/bottleneck.py.
//
// Errors, absolute or relative to the result where that is smaller than 1: at most 2e-7, a few roundings of fp32.
#pragma once
#include "exp.h"
#include "kernels.h"

namespace fusetune::FUSETUNE_ISA {

struct ValueAndSlope {
  F value, slope;
};

// s = 1 / (1 + e^-z) and 1 - s, which is not left to cancel; from e^-|z| so that nothing overflows.
struct Sigmoid {
  F value, rest;
};
FUSETUNE_INLINE Sigmoid sigmoid(F z) {
  const F e = exp_nonpositive(sub(zero(), abs(z)));
  const F over = div(set1(1.f), add(set1(1.f), e)), under = mul(e, over);
  return {select(gt(zero(), z), under, over), select(gt(zero(), z), over, under)};
}

// From e^-2|z|, which cancels near 0: there by an odd polynomial (a least-maximum fit to 0.6, 2.6e-9).
FUSETUNE_INLINE F tanh(F z) {
  const F size = abs(z), square = mul(z, z);
  const F e = exp_nonpositive(mul(size, set1(-2.f)));
  const F far = div(sub(set1(1.f), e), add(set1(1.f), e));
  F p = fma(set1(-0.005905817728489637f), square, set1(0.020805343985557556f));
  p = fma(p, square, set1(-0.05378667265176773f));
  p = fma(p, square, set1(0.13331958651542664f));
  p = fma(p, square, set1(-0.33333298563957214f));
  const F near = fma(mul(z, square), p, z);
  return select(gt(size, set1(0.6f)), select(gt(zero(), z), sub(zero(), far), far), near);
}

// The normal distribution's function at z, and e^(-z^2/2).
//
// Its tail beyond |z| is e^(-z^2/2) times a smooth function, here a polynomial in 1 / (1 + 0.21 |z|) (a least-maximum
// fit of its relative error to |z| = 13.3, beyond which fp32 underflows: 1.3e-8).
struct Normal {
  F below, bell;
};
FUSETUNE_INLINE Normal normal(F z) {
  const F bell = exp_nonpositive(mul(mul(z, z), set1(-0.5f)));
  const F q = div(set1(1.f), fma(abs(z), set1(0.21f), set1(1.f)));
  F p = fma(set1(-0.07218917459249496f), q, set1(0.28622013330459595f));
  p = fma(p, q, set1(-0.33580997586250305f));
  p = fma(p, q, set1(0.3559442162513733f));
  p = fma(p, q, set1(-0.09861882030963898f));
  p = fma(p, q, set1(0.1269703507423401f));
  p = fma(p, q, set1(0.0686224028468132f));
  p = fma(p, q, set1(0.08515478670597076f));
  p = fma(p, q, set1(0.08370606601238251f));
  const F tail = mul(mul(p, q), bell);
  return {select(gt(zero(), z), tail, sub(set1(1.f), tail)), bell};
}

// s + z s (1 - s) inner: the derivative of z sigmoid(v) with v' = inner.
FUSETUNE_INLINE F gated_slope(F z, const Sigmoid& s, F inner) {
  return fma(mul(z, mul(s.value, s.rest)), inner, s.value);
}

template <Activation kind>
FUSETUNE_INLINE ValueAndSlope activate(F z) {
  const F one = set1(1.f);
  if constexpr (kind == Activation::relu) {
    // Not max, which may take 0 for NaN.
    return {select(gt(zero(), z), zero(), z), select(gt(z, zero()), one, zero())};
  } else if constexpr (kind == Activation::leakyrelu) {
    const F slope = select(gt(z, zero()), one, set1(0.01f));
    return {mul(z, slope), slope};
  } else if constexpr (kind == Activation::gelu) {
    const Normal n = normal(z);
    return {mul(z, n.below), fma(mul(z, set1(0.3989422804f)), n.bell, n.below)};
  } else if constexpr (kind == Activation::gelu_new) {
    // 0.5 (1 + tanh u) = sigmoid(2u), u = sqrt(2 / pi) (z + 0.044715 z^3)
    const F square = mul(z, z), twice = set1(1.595769122f);
    const Sigmoid s = sigmoid(mul(mul(z, twice), fma(square, set1(0.044715f), one)));
    return {mul(z, s.value), gated_slope(z, s, mul(twice, fma(square, set1(0.134145f), one)))};
  } else if constexpr (kind == Activation::silu) {
    const Sigmoid s = sigmoid(z);
    return {mul(z, s.value), gated_slope(z, s, one)};
  } else if constexpr (kind == Activation::tanh) {
    const F t = FUSETUNE_ISA::tanh(z);
    return {t, sub(one, mul(t, t))};
  } else if constexpr (kind == Activation::sigmoid) {
    const Sigmoid s = FUSETUNE_ISA::sigmoid(z);
    return {s.value, mul(s.value, s.rest)};
  } else {
    return {z, one};
  }
}

// Calls f(value_and_slope) with the function of an activation.
template <class Function>
static void with_activation(Activation kind, const Function& f) {
  switch (kind) {
    case Activation::relu: return f(activate<Activation::relu>);
    case Activation::gelu: return f(activate<Activation::gelu>);
    case Activation::gelu_new: return f(activate<Activation::gelu_new>);
    case Activation::silu: return f(activate<Activation::silu>);
    case Activation::tanh: return f(activate<Activation::tanh>);
    case Activation::leakyrelu: return f(activate<Activation::leakyrelu>);
    case Activation::sigmoid: return f(activate<Activation::sigmoid>);
    case Activation::identity: return f(activate<Activation::identity>);
  }
}

}  // namespace fusetune::FUSETUNE_ISA
