"""The bridge on disk: preference datasets in Megatron's own file format, and the micro-batches made from them."""
