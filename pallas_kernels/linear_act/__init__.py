"""linear_act: act(x w + b), the activation applied to the accumulator of the product."""
