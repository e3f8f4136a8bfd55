"""MM-Embed: universal multimodal retrieval with a multimodal language model.

Lin, Lee, Shoeybi, Lin, Catanzaro, Ping, ICLR 2025 (arXiv 2411.02571). One embedding for any mix of text and picture,
steered by an instruction:

1. M^rand: train with the other queries' positives as negatives
2. mine: search the pool of all modalities with M^rand, the first 50 of each query;
   C1: of another modality than the instruction asks for, ranked above the positive;
   C2: of the right modality, ranked below 45
3. M^hard: train with one more negative for each query, drawn from C1 or C2 with equal probability
4. MM-Embed: go on with text retrieval mixed in, each batch of one kind

| equation | function |
| --- | --- |
| contrastive loss over all positives and hard negatives of the batch, section 3.1 | `raydr.losses.contrastive` |
| C1 and C2, section 3.2 | `raydr.stages.modality` |
| EOS, mean and latent-attention pooling, with the instruction left out (NV-Embed) | `raydr.models.multimodal` |

Deviations: what the paper leaves open is set as its released model and its re-implementations have it (see the values'
sources); M^hard starts from the same weights as M^rand or from M^rand, as `hard_from` says.

    method: {import_path: "raydr.methods.mm_embed:MMEmbed", args: {model: llava-hf/llava-v1.6-mistral-7b-hf}}
"""
