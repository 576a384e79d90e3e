"""The small model that plans are held against."""

from megatron_sppo.architecture import Architecture
from megatron_sppo.layer_parts import LatentAttention

TINY = Architecture(
    family="llama",
    num_layers=4,
    hidden_size=64,
    ffn_hidden_size=192,
    num_attention_heads=8,
    num_query_groups=4,
    kv_channels=8,
    vocab_size=384,
    max_position_embeddings=512,
    layernorm_epsilon=1e-5,
    rotary_base=1e4,
    share_embeddings_and_output_weights=False,
)
_LATENT = LatentAttention(q_lora_rank=20, kv_lora_rank=12, qk_head_dim=6, qk_pos_emb_head_dim=4, v_head_dim=8)
LATENTS = {"kv_channels": 10, "num_query_groups": 8, "latent_attention": _LATENT}
MIXTURE = {"family": "mixtral", "num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 96}
