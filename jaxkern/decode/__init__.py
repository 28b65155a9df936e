"""Text generation: weights packed for the decode step, its cache, and the loop around it."""

from jaxkern.decode.cache import KVCache as KVCache
from jaxkern.decode.cache import Status as Status
from jaxkern.decode.generation import GeneratedTokens as GeneratedTokens
from jaxkern.decode.generation import generate as generate
from jaxkern.decode.pack import PackedWeights as PackedWeights
from jaxkern.decode.pack import pack_weights as pack_weights
from jaxkern.decode.sampling import sample as sample
from jaxkern.decode.step import DecodedTokens as DecodedTokens
from jaxkern.decode.step import decode_step as decode_step
from jaxkern.decode.step import decode_steps as decode_steps
from jaxkern.decode.step import prefill as prefill
