import { mount } from 'svelte'
import './app.css'
import Page from './App.svelte'
import { parseRun, type Run } from './lib/run'
import { App } from './state/app.svelte'

// The page as built into one file carries a run; before anything is drawn it is its own template.
const holder = document.getElementById('run')
const content = holder?.textContent?.trim() ?? ''
const source = content && `<!doctype html>\n${document.documentElement.outerHTML}`

function embedded(): Run | null {
  return content ? parseRun(content) : null
}

async function template(): Promise<string> {
  return source || (await fetch('standalone.html')).text()
}

try {
  mount(Page, { target: document.getElementById('app')!, props: { app: new App(embedded()), template } })
} catch (error) {
  document.getElementById('app')!.textContent = (error as Error).message
  throw error
}
