// The search runs in a worker, and a page that is opened from a folder may start none: there, in a hidden frame.
if (location.protocol === "file:")
  window.Worker = class extends EventTarget {
    constructor(script) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      this.inside = new Promise((resolve) => {
        document.addEventListener("DOMContentLoaded", () => {
          document.body.append(frame);
          const { contentWindow, contentDocument } = frame;
          contentWindow.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
          const element = contentDocument.createElement("script");
          element.onload = () => resolve(contentWindow);
          element.src = new URL(script, location.href);
          contentDocument.head.append(element);
        });
      });
    }

    postMessage(data) {
      this.inside.then((window) => window.dispatchEvent(new MessageEvent("message", { data })));
    }
  };
