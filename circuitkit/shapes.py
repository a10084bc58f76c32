"""The axis words that every annotation uses, and aliases for the tensors that travel between files.

batch    examples, or rows of a replay            pos     token position; a recurrent network's time
answer   positions at which the answer is read    k       alternatives counted as right (or wrong)
head     query heads                              kv      key/value heads
d        width of the stream                      d_head  width of one head
vocab    output classes                           src     writers (rows of the edge matrix)
dst      readers (columns of the edge matrix)     node    writers or readers of one site
width    numbers per node at a site               circuit circuits stacked on the batch axis
"""

from jaxtyping import Bool, Float, Int
from torch import Tensor

Tokens = Int[Tensor, "batch pos"]
Numbers = Float[Tensor, "batch pos size"]
Inputs = Tokens | Numbers
Logits = Float[Tensor, "batch answer vocab"]
Stream = Float[Tensor, "batch pos d"]
EdgeMatrix = Float[Tensor, "src dst"]
EdgeMask = Bool[Tensor, "src dst"]
PerExample = Float[Tensor, "batch"]
