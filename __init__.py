"""ComfyUI entry point of the SaRA pack."""

WEB_DIRECTORY = "./js"


async def comfy_entrypoint():
    # Imported here, not above: pytest imports this file when it collects tests.
    from .nodes import SaraExtension

    return SaraExtension()
