"""
The SAEs of a run for other people's tools: folders L<block> that SAELens loads with
SAE.load_from_disk, architecture topk, on the layer's normalised input norm(x). Nothing of the SAE
is left behind.
"""
import json
from pathlib import Path

from features import write_whole

HOOKS = dict(resid='hook_resid_post', mlp='hook_mlp_out', attn='hook_attn_out') # of SAELens

def export(options):
    """A view: writes the SAEs to --export, and yields what was written. Raises ValueError."""
    run, config = options.run, options.run.model.config
    if config.sae_site not in HOOKS:
        raise ValueError(f"site {config.sae_site} is no TopK autoencoder (it has no encoder of its "
                         "own): SAELens has no such SAE; resid, mlp and attn can be exported")
    for layer, sae in run.model.saes().items():
        path = Path(options.export) / f'L{layer}'
        metadata = dict(sae_lens_version='6.0.0',            # that of the format
                        hook_name=f'blocks.{layer}.{HOOKS[config.sae_site]}',
                        context_size=config.block_size, step=run.checkpoint['step'],
                        input='RMS-normalised: x / sqrt(mean(x^2))',
                        scale=sae.scale.item())              # times what it decodes goes on
        about = dict(architecture='topk', d_in=sae.n_embd, d_sae=sae.n_features, k=sae.k,
                     dtype='float32', device='cpu', apply_b_dec_to_input=False,
                     normalize_activations='none', reshape_activations='none',
                     rescale_acts_by_decoder_norm=False, metadata=metadata)
        b_enc = sae.b_enc - sae.W_enc @ sae.mean             # so that h is read as it is
        raw = safetensors(dict(W_enc=sae.W_enc.T, b_enc=b_enc, W_dec=sae.W_dec, b_dec=sae.b_dec))
        write_whole(path / 'sae_weights.safetensors', lambda file: file.write(raw))
        (path / 'cfg.json').write_text(json.dumps(about, indent=1), 'utf-8')
        yield f'SAE of block {layer} -> {path}'

def safetensors(tensors):
    """{name: tensor} -> bytes of a safetensors file: length of the header, header in JSON, data."""
    header, data = {}, b''
    for key, x in tensors.items():
        begin = len(data)
        data += x.detach().float().cpu().numpy().astype('<f4').tobytes()
        header[key] = dict(dtype='F32', shape=x.shape, data_offsets=[begin, len(data)])
    header = json.dumps(header).encode()
    header += b' ' * (-len(header) % 8)
    return len(header).to_bytes(8, 'little') + header + data
