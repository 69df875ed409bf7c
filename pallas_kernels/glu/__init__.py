"""glu: act(x w_gate + b_gate) * (x w_up + b_up), the gated unit of SwiGLU, GEGLU and ReGLU."""
