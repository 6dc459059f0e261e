"""KV blocks of 16 tokens for vLLM's CPU attention.

vLLM's CPU kernels work on multiples of 16 tokens, but its backend admits multiples of 32 alone, the faster layout for
long contexts. Prompts of reasoning tasks are short and repeated: with blocks of 32, up to 32 tokens of a prompt are
computed again for every sample of a group, which costs more than the layout gains.
"""

from __future__ import annotations

from vllm.v1.attention.backend import MultipleOf
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend


@register_backend(AttentionBackendEnum.CPU_ATTN)
class SmallBlockAttention(CPUAttentionBackend):
    """vLLM's CPU attention with KV blocks of any multiple of 16 tokens."""

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: object = None) -> list[int | MultipleOf]:
        """Multiples of 16."""
        return [MultipleOf(16)]
