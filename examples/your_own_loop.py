"""A training loop of your own: the model, its loss and loss-free balancing without Trainer or recipe.

    python -m examples.your_own_loop

Learns to count: rows of consecutive numbers modulo 50, from random starts. Prints the loss and how evenly the experts
are used, then lets the model count on.
"""

import torch

from modeling_nanodeepseek import NanoDeepSeekConfig, NanoDeepSeekForCausalLM, update_expert_bias


def batch(rows: int = 32, length: int = 24) -> torch.Tensor:
    start = torch.randint(0, 50, (rows, 1))
    return (start + torch.arange(length)) % 50


def main(steps: int = 150) -> torch.Tensor:
    torch.manual_seed(0)
    config = NanoDeepSeekConfig(
        vocab_size=50,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=2,
        q_lora_rank=None,
        kv_lora_rank=24,
        qk_nope_head_dim=24,
        qk_rope_head_dim=8,
        v_head_dim=32,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        moe_intermediate_size=32,
        first_k_dense_replace=1,
    )
    model = NanoDeepSeekForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(1, steps + 1):
        ids = batch()
        output = model(ids, labels=ids)  # loss = cross-entropy + aux_loss_alpha * balance loss
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        load = update_expert_bias(model, gamma=0.01)  # once per optimizer step, after it
        if step % 50 == 0:
            violation = load.metrics()["expert_max_violation"]
            print(f"step {step}: cross-entropy {output.ce_loss:.3f}, max violation {violation:.2f}")
    model.eval()
    counted = model.generate(torch.tensor([[7, 8, 9]]), max_new_tokens=10, do_sample=False, eos_token_id=None)
    print("7 8 9 ->", *counted[0, 3:].tolist())
    return counted


if __name__ == "__main__":
    main()
