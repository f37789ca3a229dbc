// The optimizer rule for one weight or a vector of weights. update.h includes this file for float,
// and cpu/prune/prune_kernels.cpp once per instruction set, with ISSP_UPDATE_RULE as function
// attributes. F: float, or a struct of floats with the arithmetic of update.h (fused, times, over,
// root, flushed, +, -) that can be made from one float.

// Returns the updated weight; updates m and v in place. g is a gradient that Gradient has prepared.
template <typename F>
ISSP_UPDATE_RULE F adam_updated(F w, F g, F& m, F& v, const AdamStep& by) {
  if (by.couple) g = fused(w, F(by.coupled_decay), g);
  if (by.decouple) w = times(w, F(by.decoupled_decay));
  const F difference = g - m;  // torch's lerp starts from the nearer end
  m = flushed(by.lerp < 0.5f ? fused(difference, F(by.lerp), m)
                             : fused(difference, F(by.lerp - 1.0f), g));
  v = flushed(fused(times(g, F(by.rest2)), g, times(v, F(by.beta2))));
  const F denominator = over(root(v), F(by.bias2_root)) + F(by.eps);
  return w - over(times(F(by.step_size), m), denominator);
}

// Returns the updated weight. With momentum, updates `buffer` in place; `first` says that the
// buffer is not initialized.
template <typename F>
ISSP_UPDATE_RULE F sgd_updated(F w, F g, F& buffer, bool first, const SgdStep& by) {
  if (by.decays) g = fused(w, F(by.decay), g);
  if (by.has_momentum) {
    buffer = flushed(first ? g : fused(g, F(by.rest), times(buffer, F(by.momentum))));
    g = by.nesterov ? fused(buffer, F(by.momentum), g) : buffer;
  }
  return fused(g, F(by.minus_lr), w);
}
