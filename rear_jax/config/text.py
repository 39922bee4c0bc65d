"""Settings of texts: of the encoder that turns captions and prompts into features, and of captions made for images."""

from ml_collections import ConfigDict


def text() -> ConfigDict:
    """The encoder, and what becomes of its features."""
    text = ConfigDict()
    # weights of a T5 v1.1 or flan-T5: .safetensors or .bin file, an index of shards, or the folder that has them;
    # 'random' = <workdir>/text_encoder, a small one that the job 'caption' makes if it is not there
    text.encoder = ""
    text.vocabulary = ""  # tokenizer.json or spiece.model of the encoder; '' = the one in the folder of the encoder
    text.length = 0  # tokens of a caption, longer ones are cut; 0 = all that config.model.caption_length has room for
    text.dtype = "bfloat16"  # of the weights, the products and the stored features: 'bfloat16' or 'float32'
    text.batch_size = 128  # captions that all devices encode at once
    text.on_the_fly = False  # 'train' and 'posttrain' encode the captions inside each step; no features are stored
    # sizes of a 'random' encoder, and of one that a plan has no file of; features have config.model.caption_dim numbers
    text.depth = 2  # blocks
    text.heads = 4
    text.head_size = 16
    text.mlp_width = 128
    text.vocabulary_size = 512  # tokens at most; of 'random', the most frequent words of the captions
    return text


def describe() -> ConfigDict:
    """The job 'describe': Janus-Pro writes a caption for each image of a folder."""
    describe = ConfigDict()
    describe.images = ""  # folder of the images, where metadata.jsonl will be
    # the whole checkpoint of Janus-Pro: .safetensors or .bin file, an index of shards, or the folder that has them
    describe.weights = ""
    describe.vocabulary = ""  # its tokenizer.json; '' = the one in the folder of the weights
    describe.question = "Describe this image in one sentence."  # what is asked about each image
    describe.max_tokens = 100  # tokens of a caption, longer ones are cut
    describe.temperature = 0.0  # divisor of the logits; 0 = always the most probable token
    describe.top_p = 1.0  # total probability of the most probable tokens to draw from; 1 = off
    describe.batch_size = 8  # images that each device describes at once
    describe.dtype = "bfloat16"  # of the weights and of the products: 'bfloat16' or 'float32'
    return describe
