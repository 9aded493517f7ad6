"""diffusers' image-to-video pipeline of LTX-2 in latents: given noise, no guidance, no decoding."""

import contextlib

import numpy as np

SOUND = (4, 2)  # of an audio latent's 8 channels: latent channels, mel bins


def audio_codec():
    """An autoencoder of sounds whose latents are already normal; the pipeline asks it for their sizes alone."""
    import diffusers

    codec = diffusers.AutoencoderKLLTX2Audio(
        base_channels=8, output_channels=2, ch_mult=(1,), num_res_blocks=1, attn_resolutions=None, in_channels=2,
        resolution=32, latent_channels=SOUND[0], norm_type="pixel", causality_axis="height",
        mid_block_add_attention=False, sample_rate=16000, mel_hop_length=160, is_causal=True, mel_bins=8,
    )  # fmt: skip
    codec.latents_mean.zero_()
    codec.latents_std.fill_(1.0)
    return codec


def pipeline_of(transformer, connectors, vae):
    """The pipeline of these parts, without text encoder and vocoder."""
    import diffusers

    pipeline = diffusers.LTX2ImageToVideoPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=False, shift_terminal=None),
        text_encoder=None, tokenizer=None, vocoder=None, transformer=transformer, connectors=connectors, vae=vae,
        audio_vae=audio_codec(),
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@contextlib.contextmanager
def isolated(transformer):
    """The transformer's streams do not hear each other."""
    run = transformer.forward
    transformer.forward = lambda *args, **kwargs: run(*args, **(kwargs | {"isolate_modalities": True}))
    try:
        yield
    finally:
        del transformer.forward


def sampled(pipeline, *, scene, noise, states, mask, times, frames, fps, audio):
    """{"video": [1 f h w c], "audio": [1 n c]} as ours: what the pipeline samples.

    Args:
      scene: [1 1 h w c] the first frame's latents.
      noise: by stream, as `sampling.draw_noise`; without audio, any is given to the stream that is not heard.
      states: [1 l d k] of the text encoder.
      mask: [1 l] real tokens, at the end.
      times: without the closing 0.
      frames, fps: of the clip.
      audio: "joint" or "off".
    """
    import torch

    mean, std = (getattr(pipeline.vae, f"latents_{name}").numpy() for name in ("mean", "std"))
    start = np.concatenate([scene, noise["video"][:, 1:]], 1) * std + mean
    moments = round(frames / fps * 25)
    sound = np.asarray(noise.get("audio", np.zeros((1, moments, 8), np.float32)))
    off = {f"{name}guidance_scale": 1.0 for name in ("", "audio_")}
    off |= {f"{name}{key}": value for name in ("", "audio_") for key, value in
            (("stg_scale", 0.0), ("modality_scale", 1.0), ("guidance_rescale", 0.0))}  # fmt: skip
    height, width = (32 * side for side in scene.shape[2:4])
    with isolated(pipeline.transformer) if audio == "off" else contextlib.nullcontext():
        video, heard = pipeline(
            image=None, latents=torch.from_numpy(np.moveaxis(start, -1, 1).copy()),
            audio_latents=torch.from_numpy(sound.reshape(1, moments, *SOUND).swapaxes(1, 2).copy()),
            height=height, width=width, num_frames=frames, frame_rate=fps, num_inference_steps=len(times),
            sigmas=[float(t) for t in times], use_cross_timestep=False, image_crf=0,
            prompt_embeds=torch.from_numpy(states).flatten(2), prompt_attention_mask=torch.from_numpy(mask).long(),
            output_type="latent", return_dict=False, **off,
        )  # fmt: skip
    return {
        "video": (np.moveaxis(video.numpy(), 1, -1) - mean) / std,
        "audio": heard.numpy().swapaxes(1, 2).reshape(1, moments, 8),
    }
