import { mount } from 'svelte'
import './app.css'
import Page from './App.svelte'
import { App } from './state/app.svelte'

mount(Page, { target: document.getElementById('app')!, props: { app: new App() } })
