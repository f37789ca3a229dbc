// The optimizer's rule for one weight, or for a vector of them: included by update.h for float, and
// once per instruction set by cpu/passes.cpp, with ISSP_UPDATE_RULE the functions' attributes.
// F: float, or a struct of floats with the arithmetic of update.h (fused, times, over, root,
// flushed, +, -) that can be made from one float.

// Returns the updated weight; m and v are updated in place. g has been through Gradient.
template <typename F>
ISSP_UPDATE_RULE F adam_updated(F w, F g, F& m, F& v, const AdamStep& by) {
  if (by.couple) g = fused(w, F(by.coupled_decay), g);
  if (by.decouple) w = times(w, F(by.decoupled_decay));
  const F ahead = g - m;  // torch's lerp starts from the nearer end
  m = flushed(by.lerp < 0.5f ? fused(ahead, F(by.lerp), m) : fused(ahead, F(by.lerp - 1.0f), g));
  v = flushed(fused(times(g, F(by.rest2)), g, times(v, F(by.beta2))));
  const F denominator = over(root(v), F(by.bias2_root)) + F(by.eps);
  return w - over(times(F(by.step_size), m), denominator);
}

// Returns the updated weight. `buffer` is updated in place where there is momentum, and not read
// when this is its `first` step.
template <typename F>
ISSP_UPDATE_RULE F sgd_updated(F w, F g, F& buffer, bool first, const SgdStep& by) {
  if (by.decays) g = fused(w, F(by.decay), g);
  if (by.has_momentum) {
    buffer = flushed(first ? g : fused(g, F(by.rest), times(buffer, F(by.momentum))));
    g = by.nesterov ? fused(buffer, F(by.momentum), g) : buffer;
  }
  return fused(g, F(by.minus_lr), w);
}
