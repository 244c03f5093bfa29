/* Browsers start no worker from a file: there the search runs in a hidden frame. */
if (location.protocol === "file:") {
  window.IFrameWorker = window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      const frame = document.createElement("iframe")
      frame.hidden = true
      document.body.append(frame)
      const inside = frame.contentWindow
      const waiting = []
      const pass = data => inside.dispatchEvent(new MessageEvent("message", { data }))
      this.postMessage = data => waiting.push(data)
      inside.document.open()
      inside.document.write("<!doctype html><title>Search</title>")
      inside.document.close()
      inside.postMessage = data => this.dispatchEvent(new MessageEvent("message", { data }))
      const script = inside.document.createElement("script")
      script.src = new URL(url, location.href).href
      script.onload = () => {
        this.postMessage = pass
        waiting.forEach(pass)
      }
      inside.document.body.append(script)
    }
  }
}
