"""One adapter per family of vision-language models (`vision.VisionFamily`)."""
