"""From the encoder's feature maps to a task's prediction.

- `pyramid`: feature maps of several strides, from any encoder
- `upernet`: a class for each pixel, with `sliding_window` for images larger than the model's
- `rcnn`: Faster and Mask R-CNN on the pyramid
"""
