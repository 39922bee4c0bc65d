"""Settings of texts: of the encoder that turns captions and prompts into features, and of captions made for images."""

from ml_collections import ConfigDict


def text() -> ConfigDict:
    """The encoder, and the features that the job 'caption' writes."""
    text = ConfigDict()
    # weights of a T5 v1.1 or flan-T5: .safetensors or .bin file, an index of shards, or the folder that has them;
    # '' = <workdir>/text_encoder, which the job 'caption' makes if it is not there, with random weights
    text.encoder = ""
    text.vocabulary = ""  # tokenizer.json or spiece.model of the encoder; '' = the one in the folder of the encoder
    text.length = 0  # tokens of a caption, longer ones are cut; 0 = all that config.model.caption_length has room for
    text.dtype = "bfloat16"  # of the weights, the products and the stored features: 'bfloat16' or 'float32'
    text.batch_size = 32  # captions that each device encodes at once
    # sizes of an encoder that is made here: its features have config.model.caption_dim numbers
    text.depth = 2  # blocks
    text.heads = 4  # heads, each of 16 features
    text.vocabulary_size = 512  # words, the most frequent ones of the captions
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
